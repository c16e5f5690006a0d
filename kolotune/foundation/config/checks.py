"""Checks that types and bounds cannot make: names, dates, paths, and options that exclude each other."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.name_patterns import read_patterns
from kolotune.foundation.objectives import LOSS_OPTIONS, OBJECTIVES, LearnsFrom, Objective
from kolotune.foundation.quantization_types import NEEDS_IMPORTANCE_MATRIX, NONE, find_problem

from .normalize import exists
from .option import Kind
from .options import OPTIONS, RECORD_PARTS, Config, option_names

_NOT_FOR_TEXT = {
    "train_on": "a plain text has no answers, and all of it is trained on",
    "split_thoughts": "a plain text has no thoughts",
    "empty_thoughts": "a plain text has no thoughts",
    "fix_turns": "a plain text has no turns",
    "template_switch": "a plain text is written without a chat template",
    "chat_template": "a plain text is written without a chat template; give it to the run on chats that starts from "
    "this one",
    "system": "a model of plain text is trained without a system prompt; give it to the run on chats that starts from "
    "this one",
}
"""Options that make no sense for plain texts, and why."""


def find_problems(config: Config | None, values: Mapping[str, object]) -> Iterator[str]:
    """Return what is wrong with options, a line each.

    Args:
        config: the options; None if a single value is invalid already.
        values: what was given, normalised.
    """
    yield from _quantization_problems(values)
    for name in option_names(kind=Kind.DATE):
        date = values.get(name)
        if date is not None and not _is_date(str(date)):
            yield f"{_flag(name)}: {date!r} is not a date in the form YYYY-MM-DD"
    for name in option_names(kind=Kind.PARAMETERS):
        for setting in _items(values, name):
            if "=" not in str(setting):
                yield f"{_flag(name)}: {setting!r} is not of the form name=value"
    for entry in _items(values, "map"):
        part, sign, key = str(entry).partition("=")
        if not sign or not key.strip() or part.strip().lower() not in RECORD_PARTS:
            yield f"map: {entry!r} is not of the form part=key; parts are {', '.join(RECORD_PARTS)}"
    yield from _pattern_problems(values)
    experts = _items(values, "target_parameters")
    if len(experts) > 1 and {"auto", "none", "all-experts"} & set(map(str, experts)):
        yield "target-parameters: auto, none and all-experts can't be combined with names"
    yield from _path_problems(values)
    if config is not None:
        yield from _conflicts(config, values)


def _conflicts(config: Config, values: Mapping[str, object]) -> Iterator[str]:
    if config.eval_data and "eval_split" in values and config.eval_split > 0:
        yield "eval-data and eval-split exclude each other"
    yield from _objective_conflicts(config)
    if config.init_lora_weights != "default" and config.start_from is not None:
        yield "init-lora-weights: the adapter of start-from has its weights already; leave one of them out"
    if (config.new_token or config.new_special_token) and config.start_from is not None:
        yield "new-token: the adapter of start-from was trained without these tokens; leave one of them out"
    if config.modules_to_save and config.start_from is not None:
        yield "modules-to-save: the adapter of start-from has no such modules; leave one of them out"
    if config.use_dora and config.lora_dropout:
        yield (
            "use-dora and lora-dropout exclude each other: each layer would need a second product with the base's "
            "weights; leave lora-dropout out"
        )
    if config.nnodes > 1 and config.rdzv is None:
        yield "nnodes: several machines need rdzv, the address of one of them as HOST:PORT"
    processes = config.nnodes * config.nproc
    if config.sharding == "on" and (processes == 1 or config.load_in_4bit):
        yield "sharding: needs several processes (nproc, nnodes) and cannot be combined with load-in-4bit"
    if config.sharding == "off" and ENGINES[config.engine].always_shards and processes > 1:
        yield f"sharding: several processes of {config.engine} always shard the base; leave sharding out"


def _objective_conflicts(config: Config) -> Iterator[str]:
    """Return the options that the objective has not, or that leave it nothing to learn."""
    objective = OBJECTIVES[config.objective]
    if objective.learns_from is LearnsFrom.TEXT:
        for name, reason in _NOT_FOR_TEXT.items():
            if getattr(config, name) != OPTIONS[name].default:
                yield f"{_flag(name)}: {reason}; leave it out, or train with objective sft"
    parts = {str(entry).partition("=")[0].strip().lower() for entry in config.map}
    if "text" in parts and objective.learns_from is not LearnsFrom.TEXT:
        yield "map: only objective text reads a text"
    elif parts - {"text"} and objective.learns_from is LearnsFrom.TEXT:
        yield "map: objective text reads nothing but a text; name its key as text=key"
    if objective.learns_from is not LearnsFrom.CHATS:
        yield from _answer_conflicts(config, objective)
    for name in LOSS_OPTIONS:
        if name not in objective.loss_options and getattr(config, name) != OPTIONS[name].default:
            owners = [other for other, each in OBJECTIVES.items() if name in each.loss_options]
            yield (
                f"{_flag(name)}: objective {config.objective} has no such number; leave it out, or train with "
                f"objective {' or '.join(owners)}"
            )
    if "desirable_weight" in objective.loss_options and not config.desirable_weight + config.undesirable_weight:
        yield "desirable-weight and undesirable-weight: both are 0, so nothing would be learned; give one of them more"


def _answer_conflicts(config: Config, objective: Objective) -> Iterator[str]:
    """Return the options that are about answers of chats, for an objective that learns from something else."""
    if config.keep_general:
        yield (
            f"keep-general: objective {config.objective} has no place for answers of the base; leave it out, or train "
            "with objective sft"
        )
    if objective.has_preferences and config.train_on != "all":
        yield "train-on: preferences train what follows the prompt; leave it out, or train with objective sft"
    if objective.has_preferences and config.split_thoughts:
        yield "split-thoughts: preferences are not split; leave it out, or train with objective sft"


def _pattern_problems(values: Mapping[str, object]) -> Iterator[str]:
    for name in ("rank_pattern", "alpha_pattern"):
        for entry in filter(lambda each: "=" in str(each), _items(values, name)):
            try:
                number = next(iter(read_patterns([str(entry)]).values()))
            except ValueError:
                yield f"{_flag(name)}: {entry!r} is not of the form NAME=NUMBER, with the end of a layer's name"
                continue
            if name == "rank_pattern" and number not in range(1, 4097):
                yield f"{_flag(name)}: {entry!r}: ranks are whole numbers from 1 to 4096"
            elif not 0 < number < math.inf:
                yield f"{_flag(name)}: {entry!r}: alpha is a number above 0"


def _quantization_problems(values: Mapping[str, object]) -> Iterator[str]:
    without_matrix = values.get("importance_matrix") == "never"
    for option in option_names(kind=Kind.QUANTIZATIONS):
        names = [str(name) for name in _items(values, option)]
        for name in names:
            if problem := find_problem(name):
                yield f"{_flag(option)}: {problem}"
            elif without_matrix and name in NEEDS_IMPORTANCE_MATRIX:
                yield f"{_flag(option)}: {name} needs an importance matrix, but importance-matrix is never"
        if NONE in names and option == "compare_quantization":
            yield f"{_flag(option)}: the unquantized model is always compared; leave none out"
        elif NONE in names and len(names) > 1:
            yield f"{_flag(option)}: none cannot be combined with other quantizations"


def _path_problems(values: Mapping[str, object]) -> Iterator[str]:
    for kind in (Kind.CHAT_FILES, Kind.FILE, Kind.ADAPTER, Kind.BASE_MODEL, Kind.FOLDER):
        for name in option_names(kind=kind):
            value = values.get(name, ())
            for path in value if isinstance(value, tuple) else (value,):
                if "\0" in str(path):
                    yield f"{_flag(name)}: a file name cannot contain a NUL character"
                elif not _can_be_encoded(str(path)):
                    yield f"{_flag(name)}: a file name cannot contain half a character"
    for name in option_names(kind=Kind.SECRET_SOURCE):
        source = values.get(name)
        if source not in (None, "-") and not (exists(Path(str(source))) and Path(str(source)).is_file()):
            # The message does not repeat the value, which may be the token itself.
            yield (
                f"{_flag(name)}: takes a file or - for standard input, never the token itself: "
                "other users can see a command line"
            )


def _can_be_encoded(name: str) -> bool:
    """Whether the system has bytes for a name. Half a character in a name that the system itself gave is fine."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def _items(values: Mapping[str, object], name: str) -> Sequence[object]:
    """Return the list that an option should be; empty if it is something else, which validation reports."""
    value = values.get(name, ())
    return value if isinstance(value, (list, tuple)) else ()


def _is_date(text: str) -> bool:
    try:
        datetime.date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _flag(name: str) -> str:
    return name.replace("_", "-")
