"""Flags, a YAML file, a run folder's saved config and the defaults become one `Config`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.objectives import OBJECTIVES

from .checks import find_problems
from .normalize import normalize
from .option import Kind
from .options import DEFAULT_OUTPUT_DIR, OPTIONS, Config

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from pydantic_core import ErrorDetails

ADAPTER_FORM = (
    "lora_rank", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
    "target_parameters",
)  # fmt: skip
"""The options that are the adapter's own where a training starts from one (`start_from`)."""
Layer: TypeAlias = tuple[Mapping[str, object], str, Path]
"""Values, what they are called in messages, and the folder that their relative paths start from."""


def resolve(*layers: Layer) -> Config:
    """Resolve several layers of options; a later layer wins.

    A value of None counts as not given; an explicit 0, empty string or False is kept. An option that no layer gives
    has the engine's default. A run's saved config gives every option that has a value: so another engine for that run
    changes only the engine, and the values that were automatic (warmup, batch) become that engine's. Another objective
    drops the numbers of the earlier one that it has not.

    Raises:
        ConfigError: unknown options and impossible values, all in one message.
    """
    values: dict[str, object] = {"output_dir": DEFAULT_OUTPUT_DIR.absolute()}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for layer, origin, folder in layers:
        for name in _loss_options_lost(values.get("objective"), layer.get("objective")):
            values.pop(name, None)
            origins.pop(name, None)
        for name, value in layer.items():
            if name not in OPTIONS:
                problems.append(f"{origin}: unknown option {name!r}{_suggestion(name)}")
            elif value is not None:
                values[name] = normalize(name, value, folder)
                origins[name] = origin
    given = frozenset(origins)
    if isinstance(engine := values.get("engine"), str) and engine in ENGINES:
        values = {**ENGINES[engine].defaults, **values}
    config, invalid = _validate(values, origins)
    problems += [*invalid, *find_problems(config, values)]
    if config is None or problems:
        raise ConfigError("\n".join(problems))
    return dataclasses.replace(config, given=given)


def _loss_options_lost(before: object, after: object) -> list[str]:
    """Return the numbers that the objective of earlier layers has, and that of a later layer has not."""
    old, new = (OBJECTIVES.get(each) if isinstance(each, str) else None for each in (before, after))
    return [name for name in old.loss_options if name not in new.loss_options] if old and new else []


def _validate(values: Mapping[str, object], origins: Mapping[str, str]) -> tuple[Config | None, list[str]]:
    """Return the config, or None and what is wrong with single values."""
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(values), []
    except ValidationError as error:
        return None, list(_describe(error.errors(), origins))


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    """Return what validates; making it takes longer than all the rest."""
    from pydantic import TypeAdapter

    return TypeAdapter(Config)


def _describe(errors: list[ErrorDetails], origins: Mapping[str, str]) -> Iterator[str]:
    for error in errors:
        name = str(error["loc"][0]) if error["loc"] else ""
        message = error["msg"].replace("Input should be", "must be").partition(", unable to")[0]
        value = error["input"]
        if name in OPTIONS and OPTIONS[name].kind is Kind.SECRET_SOURCE:
            shown = message  # the value may be the secret itself
        elif isinstance(value, Mapping):
            shown = message
        else:
            shown = f"{message[0].lower()}{message[1:]}, not {value!r}"
        yield f"{origins.get(name, 'config')}: {name.replace('_', '-')} {shown}"


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), OPTIONS, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
