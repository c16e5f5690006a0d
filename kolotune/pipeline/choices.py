"""Options that are chosen automatically: the first run in a folder chooses, later runs keep its choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from kolotune.engines.engine import get_engine
from kolotune.foundation import hardware, typed_storage
from kolotune.foundation.config import ADAPTER_FORM, Config
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import now
from kolotune.run_folder.stage import Context
from kolotune.stages import train
from kolotune.weights.starting_adapter import read_starting_adapter

from .stages import STAGE_NAMES

_AUTO = ("auto",)


@dataclass(frozen=True)
class Choices:
    """What was chosen; None where nothing had to be.

    Attributes:
        template_date: the date that the chat template shows, as YYYY-MM-DD.
        dtype: in which the model is trained.
        compile: "on" or "off": whether the training step is compiled.
        target_parameters: "all-experts" or "none": whether experts get adapters, in a model that has some.
    """

    template_date: str | None = None
    dtype: Literal["bf16", "fp32"] | None = None
    compile: Literal["on", "off"] | None = None
    target_parameters: Literal["all-experts", "none"] | None = None


def choose(config: Config, folder: RunFolder, names: Collection[str] = STAGE_NAMES) -> tuple[Config, Choices]:
    """Replace the options that are left to us by choices: those of the folder's first run, or new ones.

    Args:
        config: the resolved options.
        folder: the run folder; nothing is written.
        names: the stages that run. Whether to compile is chosen only for a training: it takes compiling to find out.

    Returns:
        The options, and all choices of the folder, for `write_choices`.
    """
    choices = typed_storage.read_or_none(Choices, folder.choices) or Choices()
    if choices.template_date is None:
        choices = dataclasses.replace(choices, template_date=now()[:10])
    if choices.dtype is None and config.dtype == "auto":
        choices = dataclasses.replace(choices, dtype=hardware.best_dtype())
    engine, dtype = get_engine(config.engine), (choices.dtype or "") if config.dtype == "auto" else config.dtype
    if choices.compile is None and config.compile == "auto" and train.NAME in names and engine.has_compiled_step:
        choices = dataclasses.replace(choices, compile="on" if engine.can_compile(dtype) else "off")
    if config.template_date is None:
        config = dataclasses.replace(config, template_date=choices.template_date)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=choices.dtype or "auto")
    if config.compile == "auto":
        config = dataclasses.replace(config, compile=choices.compile or "auto")
    return config, choices


def follow_start(context: Context) -> Context:
    """Replace rank, alpha and layers of the adapter by those of the adapter that the training starts from.

    Raises:
        ConfigError: other ones were given, or the adapter can't be trained further.
        ModelError, ArtifactError: there is no such adapter.
    """
    config = context.config
    if config.start_from is None:
        return context
    start = read_starting_adapter(config.start_from)
    form = dataclasses.replace(
        config,
        lora_rank=start.rank,
        lora_alpha=start.alpha,
        rank_pattern=tuple(f"{name}={number:.17g}" for name, number in start.rank_patterns.items()),
        alpha_pattern=tuple(f"{name}={number:.17g}" for name, number in start.alpha_patterns.items()),
        use_rslora=start.rank_stabilised,
        use_dora=start.has_magnitudes,
        target_modules=start.target_modules,
        target_parameters=start.target_parameters or ("none",),
    )
    for name in ADAPTER_FORM:
        value, wanted = getattr(form, name), getattr(config, name)
        is_same = set(wanted) in ({"auto"}, set(value)) if isinstance(value, tuple) else wanted == value
        if name in config.given and not is_same:
            flag = name.replace("_", "-")
            raise ConfigError(f"start-from: the adapter's {flag} is {_shown(value)}", f"Leave out --{flag}.")
    form = dataclasses.replace(form, given=config.given | {*ADAPTER_FORM})
    return dataclasses.replace(context, config=form)


def _shown(value: object) -> str:
    """Return an option's value as it would be typed."""
    if isinstance(value, tuple):
        return ",".join(value) or "none"
    return ("off", "on")[value] if isinstance(value, bool) else f"{value:g}"


def choose_experts(context: Context, choices: Choices, reporter: Reporter) -> tuple[Context, Choices]:
    """Replace the option that is chosen by the base model: whether experts get adapters; see `choose`.

    A folder whose adapter was trained by a version without them keeps its adapter.
    """
    config, folder = context.config, context.run
    is_older = choices.target_parameters is None and folder.record(train.NAME).exists()
    if config.target_parameters != _AUTO or is_older:
        return context, choices
    choice = get_engine(config.engine).choose_experts(config, context.base)
    if choice is None:
        return context, choices
    if choices.target_parameters is None:
        choices = dataclasses.replace(choices, target_parameters="all-experts" if choice.is_trained else "none")
        reporter.note(str(choice))
    chosen = (choices.target_parameters or "none",)
    return dataclasses.replace(context, config=dataclasses.replace(config, target_parameters=chosen)), choices


def write_choices(folder: RunFolder, choices: Choices) -> None:
    """Keep the choices for later runs in the folder."""
    chosen = {name: value for name, value in dataclasses.asdict(choices).items() if value is not None}
    typed_storage.write(folder.choices, chosen)
