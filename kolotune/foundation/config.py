"""The options of a run: every name, type, bound and default stands here, once.

`Config` is a frozen dataclass. Flags, a YAML file, what a run folder has saved and the defaults meet in
`resolve`, which tells all errors at once. The command line makes its flags from the same fields.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from . import quantization_types
from .engine_registry import ENGINES, EngineName
from .errors import ConfigError

if TYPE_CHECKING:
    import yaml

_YAML_LINE_BREAKS = "\x85\u2028\u2029"
DEFAULT_OUTPUT_DIR = Path("outputs")
# Of the verbs that talk to a model; they are no options of a run.
DEFAULT_TEMPERATURE, DEFAULT_MAX_TOKENS, DEFAULT_SEED = 0.7, 512, 0
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8080


def option(default: Any, text: str, *, kind: str = "training") -> Any:
    """A field of `Config`: its default, the sentence that `--help` shows, and the group it is shown in.

    Args:
        default: the value when nobody gives one.
        text: one sentence for `--help`.
        kind: the group in `--help` and in the printed config.
    """
    return field(default=default, metadata={"help": text, "kind": kind})


@dataclass(frozen=True)
class Config:
    """All options of a run, resolved. Paths are absolute, names are in their canonical case."""

    __pydantic_config__ = {"extra": "forbid", "allow_inf_nan": False}  # noqa: RUF012 - read by pydantic, not a field

    train_data: tuple[Path, ...] = option((), "Files of chats: JSONL, JSON, CSV or Parquet.", kind="data")
    eval_data: tuple[Path, ...] = option((), "Held-out chats, in place of a part of the training data.", kind="data")
    eval_split: Annotated[float, Ge(0), Lt(1)] = option(
        0.05, "Share of the chats that is held out, chosen by content.", kind="data"
    )
    skip_bad: bool = option(False, "Leave bad chats out (they are counted and listed) and go on.", kind="data")
    max_seq_length: Annotated[int, Ge(8)] = option(
        2048, "Longest chat in tokens; of longer ones whole turns are left out, and it is said.", kind="data"
    )
    template_date: str | None = option(
        None, "Date (YYYY-MM-DD) that stands in a template which prints today's; default: the first run's.", kind="data"
    )

    base_model: str = option("smollm2-135m", "Name from `kolotune models`, hub id or folder.", kind="model")
    hf_token: str | None = option(
        None, "Where the hub token is read: a file, or - for standard input. Never the token itself.", kind="model"
    )
    engine: EngineName = option(
        "native",
        f"Training engine: {'; '.join(f'{name}, {entry.summary}' for name, entry in ENGINES.items())}.",
        kind="model",
    )
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "Arithmetic of the frozen weights in training; auto: bf16 where the processor is fast at it.",
        kind="model",
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "Compile parts of the training step for this processor; auto: where it can be done (C++ compiler, no GPU).",
        kind="model",
    )
    load_in_4bit: bool = option(False, "Keep the base in 4 bits while training (bitsandbytes).", kind="model")

    epochs: Annotated[int, Ge(0)] = option(3, "Times that every chat is trained on.")
    learning_rate: Annotated[float, Ge(0), Le(1)] = option(2e-4, "Peak learning rate.")
    scheduler_type: Literal["cosine", "linear", "constant"] = option("cosine", "How the learning rate goes down.")
    warmup_steps: Annotated[int, Ge(0)] | None = option(
        None, "Steps in which the learning rate rises; default: a tenth of all, at most 100."
    )
    weight_decay: Annotated[float, Ge(0), Le(1)] = option(0.01, "AdamW's weight decay.")
    batch_size: Annotated[int, Ge(1)] | None = option(
        None, "Chats of a batch; default: 4, and of many short ones as many as make 1,000 tokens."
    )
    gradient_accumulation: Annotated[int, Ge(1)] = option(1, "Batches that make one step.")
    max_grad_norm: Annotated[float, Ge(0)] = option(1.0, "Gradients are clipped to this norm; 0: never.")
    seed: Annotated[int, Ge(0), Lt(2**32)] = option(42, "Seed of initial weights, order and dropout.")
    lora_rank: Annotated[int, Ge(1), Le(4096)] = option(16, "Rank of the adapter.")
    lora_alpha: Annotated[float, Gt(0)] = option(32.0, "Scale of the adapter; it is multiplied by alpha / rank.")
    lora_dropout: Annotated[float, Ge(0), Lt(1)] = option(0.0, "Dropout before the adapter.")
    target_modules: tuple[str, ...] = option(
        ("all-linear",), "Names of the layers that get an adapter, as q_proj,v_proj; all-linear: all but the head."
    )
    early_stopping: Annotated[int, Ge(0)] = option(
        0, "Stop when the held-out loss has not improved in so many epochs, and keep the best; 0: never."
    )
    checkpoint_steps: Annotated[int, Ge(0)] = option(
        100, "A checkpoint is written every so many steps and after each epoch; 0: after each epoch only."
    )
    use_checkpoint: bool = option(False, "Go on from the newest whole checkpoint, or start when there is none.")

    nproc: Annotated[int, Ge(1)] = option(
        1, "Processes on this machine that train together; the result does not depend on it.", kind="machines"
    )
    nnodes: Annotated[int, Ge(1)] = option(
        1, "Machines that train together; start the same command on each.", kind="machines"
    )
    rdzv: str | None = option(
        None, "HOST:PORT where several machines meet: the address of one of them, the same for all.", kind="machines"
    )
    sharding: Literal["auto", "on", "off"] = option(
        "auto",
        "Part the base over the processes, in place of one in each; auto: where it does not fit otherwise.",
        kind="machines",
    )

    merge_dtype: Literal["f16", "bf16", "fp32"] = option(
        "f16",
        "How merged weights are stored (where a value is too large for f16, fp32 is taken, and it is said).",
        kind="export",
    )
    quantization: tuple[str, ...] = option(
        ("Q4_K_M",), "One or several of llama.cpp's, as Q4_K_M,Q8_0; none: f16 only.", kind="export"
    )
    importance_matrix: Literal["auto", "always", "never"] = option(
        "auto",
        "Which weights matter, computed from the training chats; auto: for quantizations that need it or have fewer "
        "than 4 bits.",
        kind="export",
    )
    system: str | None = option(None, "System prompt for the Modelfile.", kind="export")
    parameter: tuple[str, ...] = option(
        (), "PARAMETER for the Modelfile, as temperature=0.7; may be given several times.", kind="export"
    )
    lean: bool = option(
        False, "Keep no merged folder, and no unquantized GGUF unless nothing else is made.", kind="export"
    )
    compare: bool = option(True, "Prove at the end that what was made is the model that was trained.", kind="export")
    compare_chats: Annotated[int, Ge(1)] = option(
        32, "Most held-out chats that are compared (training chats, where none are held out).", kind="comparison"
    )
    compare_length: Annotated[int, Ge(1)] = option(
        4096, "Most tokens in them; one chat is always compared.", kind="comparison"
    )
    compare_answers: Annotated[int, Ge(0)] = option(
        3, "Prompts of held-out chats that base and tuned model answer side by side.", kind="comparison"
    )
    compare_prompt: tuple[str, ...] = option(
        (), "A prompt of your own to answer in place of those; may be given several times.", kind="comparison"
    )
    compare_quantization: tuple[str, ...] = option(
        (),
        "Quantizations to measure beside the run's own, as Q5_K_M,IQ3_M: made, measured, and removed again.",
        kind="comparison",
    )
    output_dir: Path = option(DEFAULT_OUTPUT_DIR, "The run folder.", kind="export")


FIELDS = {each.name: each for each in dataclasses.fields(Config)}


def resolve(*layers: tuple[Mapping[str, Any], str, Path]) -> Config:
    """One config out of several layers.

    Args:
        layers: each ``(values, what it is called in messages, folder that its relative paths start from)``;
            a later layer wins. A value of None says nothing, an explicit 0, empty string or False counts.

    What no layer gives gets the default of the engine. A run's saved config gives every option that has a value:
    a different engine for such a run changes the engine alone, and automatic values (warmup, batch) to that engine's.

    Raises:
        ConfigError: unknown keys and impossible values, all of them in one message.
    """
    from pydantic import TypeAdapter, ValidationError

    values: dict[str, Any] = {"output_dir": DEFAULT_OUTPUT_DIR.absolute()}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for layer, origin, folder in layers:
        for key, value in layer.items():
            if key not in FIELDS:
                problems.append(f"{origin}: unknown option {key!r}{_did_you_mean(key)}")
            elif value is not None:
                values[key] = normalized(key, value, folder)
                origins[key] = origin
    if isinstance(name := values.get("engine"), str) and name in ENGINES:
        values = {**ENGINES[name].defaults, **values}
    config = None
    try:
        config = TypeAdapter(Config).validate_python(values)
    except ValidationError as error:
        for each in error.errors():
            key = str(each["loc"][0]) if each["loc"] else ""
            problems.append(f"{origins.get(key, 'config')}: {_shown(key)} {_in_words(each)}")
    problems += _cross_checks(config, values)
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return config


def normalized(key: str, value: Any, folder: Path) -> Any:
    """A value of option `key` in canonical form: lists from comma lists, absolute paths, capitals for quantizations."""
    if key in ("train_data", "eval_data"):
        items = [value] if isinstance(value, (str, Path)) else value
        return tuple(_absolute(each, folder) for each in items) if isinstance(items, (list, tuple)) else items
    if key == "output_dir":
        return _absolute(value, folder)
    if key == "hf_token" and value != "-":
        return str(_absolute(value, folder))
    if key == "base_model" and isinstance(value, str) and _means_a_folder(value, folder):
        return str(_absolute(value, folder))
    if key in ("quantization", "compare_quantization", "target_modules"):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            return items
        names = [part.strip() for each in items for part in str(each).split(",") if part.strip()]
        if key != "target_modules":
            names = [quantization_types.NONE if name.upper() == "F16" else name.upper() for name in names]
        return tuple(dict.fromkeys(names))
    if key == "compare_prompt":
        return (value,) if isinstance(value, str) else value
    if key == "parameter":
        if isinstance(value, Mapping):
            return tuple(f"{name}={each}" for name, each in value.items())
        return (value,) if isinstance(value, str) else value
    if key == "template_date":
        return str(value)
    return value


def _means_a_folder(name: str, folder: Path) -> bool:
    """Whether the name of a base model is a path: written as one, or there is such a folder."""
    if name.startswith(("./", "../", "/", "~", ".\\", "..\\")):
        return True
    return name.lower() != FIELDS["base_model"].default and bool(name) and _is_there(Path(folder, name))


def _is_there(path: Path) -> bool:
    """Whether there is such a file or folder; False also for a name that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _absolute(value: Any, folder: Path) -> Any:
    if not isinstance(value, (str, Path)):
        return value
    return Path(folder, Path(value).expanduser()).absolute()


def _cross_checks(config: Config | None, values: Mapping[str, Any]) -> list[str]:
    """What single fields can't tell: names of quantizations, dates, and options that exclude each other."""
    problems = list(_quantization_problems(values))
    date = values.get("template_date")
    if date is not None and not _is_date(str(date)):
        problems.append(f"template-date: {date!r} is no date of the form YYYY-MM-DD")
    for each in _items(values, "parameter"):
        if "=" not in str(each):
            problems.append(f"parameter: {each!r} is not of the form name=value")
    problems += _path_problems(values)
    if config is None:
        return problems
    if config.eval_data and "eval_split" in values and config.eval_split > 0:
        problems.append("eval-data and eval-split exclude each other")
    if config.nnodes > 1 and config.rdzv is None:
        problems.append("nnodes: several machines need rdzv, the address of one of them as HOST:PORT")
    if config.sharding == "on" and (config.nnodes * config.nproc == 1 or config.load_in_4bit):
        problems.append("sharding: needs several processes (nproc, nnodes), and does not go with load-in-4bit")
    if config.sharding == "off" and ENGINES[config.engine].always_shards and config.nnodes * config.nproc > 1:
        problems.append(f"sharding: several processes of {config.engine} always shard the base; leave sharding out")
    return problems


def _quantization_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Names that are none, or don't go with each other or without an importance matrix."""
    never = values.get("importance_matrix") == "never"
    for key in ("quantization", "compare_quantization"):
        names = [str(name) for name in _items(values, key)]
        for name in names:
            if problem := quantization_types.problem_with(name):
                yield f"{_shown(key)}: {problem}"
            elif never and name in quantization_types.NEEDS_IMPORTANCE_MATRIX:
                yield f"{_shown(key)}: {name} needs an importance matrix, and importance-matrix is never"
        if quantization_types.NONE in names and key == "compare_quantization":
            yield "compare-quantization: what is not quantized is always compared"
        elif quantization_types.NONE in names and len(names) > 1:
            yield "quantization: none does not go with another"


def _path_problems(values: Mapping[str, Any]) -> list[str]:
    """Names that no file can have, and a token where a file is wanted."""
    problems = []
    for key in ("train_data", "eval_data", "output_dir", "base_model"):
        given = values.get(key, ())
        for each in given if isinstance(given, tuple) else (given,):
            if "\0" in str(each):
                problems.append(f"{_shown(key)}: no file can have a name with a NUL in it")
            elif not _can_be_written(str(each)):
                problems.append(f"{_shown(key)}: no file can have a name with half a character in it")
    token = values.get("hf_token")
    if token not in (None, "-") and not (_is_there(Path(str(token))) and Path(str(token)).is_file()):
        # The value is not repeated here: it may be the token itself.
        problems.append(
            "hf-token: takes a file or - for standard input, never the token itself: a command line is visible to all"
        )
    return problems


def _can_be_written(name: str) -> bool:
    """Whether the system has bytes for a name; what it gave us itself can be half a character, and has."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _items(values: Mapping[str, Any], key: str) -> Sequence[Any]:
    """The list that option `key` should be; empty when it is something else, which has been told then."""
    found = values.get(key, ())
    return found if isinstance(found, (list, tuple)) else ()


def _is_date(text: str) -> bool:
    import datetime

    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _did_you_mean(key: str) -> str:
    near = difflib.get_close_matches(key.replace("-", "_"), FIELDS, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _shown(key: str) -> str:
    return key.replace("_", "-")


def _in_words(error: Mapping[str, Any]) -> str:
    message = str(error["msg"]).replace("Input should be", "must be").partition(", unable to")[0]
    value = error.get("input")
    if error.get("loc", [""])[0] == "hf_token":
        return message
    return f"{message[0].lower()}{message[1:]}, not {value!r}" if not isinstance(value, Mapping) else message


def load_file(path: Path) -> dict[str, Any]:
    """The options of a YAML file; keys in kebab or snake case.

    Raises:
        ConfigError: no such file, no valid YAML (with its line), or no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: can't be read: {error}", "Give a YAML file, such as `kolotune init` writes."
        ) from None
    try:
        loaded = yaml.load(text, Loader=_strict_loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ConfigError(
            f"{where}: no valid YAML: {getattr(error, 'problem', None) or error}", "Mend that line."
        ) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds no options of the form `name: value`", "See the file `kolotune init` writes.")
    return {str(key).replace("-", "_"): value for key, value in loaded.items()}


def _strict_loader() -> type[yaml.SafeLoader]:
    """YAML's safe loader, but a key that stands twice is an error: PyYAML would take the last one in silence."""
    import yaml

    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} stands there twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    return Strict


def dump(config: Config) -> str:
    """The config as YAML that `load_file` reads back.

    Left out is what belongs to one call and not to the run: where the token comes from, and use_checkpoint.
    """
    import yaml

    plain: dict[str, Any] = {}
    for name in FIELDS:
        value = getattr(config, name)
        if name in ("hf_token", "use_checkpoint") or value is None or (name == "eval_split" and config.eval_data):
            continue
        plain[name] = _plain(value)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if any(each in text for each in _YAML_LINE_BREAKS):  # PyYAML writes them as they are, and reads them as a space
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=False)
    return text


def as_record(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """The options `names` as plain values for a record."""
    return {name: _plain(getattr(config, name)) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value
