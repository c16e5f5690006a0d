"""Flags made from the fields of `Config`, and how they become one."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.reporter import Reporter, make_reporter
from kolotune.foundation.secrets import STARS

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with options; flags win over it.")]
Json = Annotated[bool, typer.Option("--json", help="Print every message as a line of JSON.")]
Data = Annotated[
    list[Path] | None,
    typer.Argument(help="Files of chats: JSONL, JSON, CSV or Parquet.", show_default=False),
]
Quantization = Annotated[
    str | None, typer.Option(help="Which GGUF: a quantization of the run, or none; default: the run's first.")
]
_HINTS = get_type_hints(Config, include_extras=True)
_chosen_reporter: dict[bool, Reporter] = {}


def reporter(as_json: bool = False) -> Reporter:
    """The reporter of this process."""
    if as_json not in _chosen_reporter:
        _chosen_reporter[as_json] = make_reporter(as_json)
    return _chosen_reporter[as_json]


def with_options(
    *kinds: str, leave_out: tuple[str, ...] = (), more: Sequence[inspect.Parameter] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command that takes ``**flags`` one flag for each option of the named kinds, and those of `more`.

    The flags' own default is always None, "not given": defaults stand in `Config`. Values are checked there too,
    so that all wrong ones are told at once.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        own = [
            each.replace(annotation=hints[each.name])
            for each in signature.parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        flags = [
            _flag(field)
            for field in dataclasses.fields(Config)
            if field.metadata["kind"] in kinds and field.name not in leave_out
        ]
        command.__signature__ = signature.replace(parameters=[*own, *more, *flags])  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in [*own, *more, *flags]}
        return command

    return add


def _flag(field: dataclasses.Field[Any]) -> inspect.Parameter:
    hint = _HINTS[field.name]
    name = "--" + field.name.replace("_", "-")
    if hint is bool:
        kind: Any = bool | None
        names = [f"{name}/--no-{name[2:]}"]
        metavar = None
    else:
        kind = list[str] | None if _is_list(field.name) else str | None
        names, metavar = [name], _metavar(hint)
    shown = typer.Option(*names, help=_help(field), metavar=metavar, show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, shown]
    )


def _is_list(name: str) -> bool:
    return name in ("train_data", "eval_data", "parameter", "compare_prompt")


def _metavar(hint: Any) -> str:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    choices = get_args(hint)
    if choices and all(isinstance(each, str) for each in choices):
        return "|".join(choices)
    text = str(hint)
    for word, shown in (("Path", "PATH"), ("float", "NUMBER"), ("int", "N")):
        if word in text:
            return shown
    return "TEXT"


def _help(field: dataclasses.Field[Any]) -> str:
    parts = [str(field.metadata["help"])]
    if field.default is not None and field.default is not False and field.default != ():
        parts.append(f"[default: {_in_words(field.default)}]")
    for name, entry in ENGINES.items():
        if field.name in entry.defaults:
            parts.append(f"[with {name}: {_in_words(entry.defaults[field.name])}]")
    return " ".join(parts)


def _in_words(default: object) -> str:
    return ",".join(str(each) for each in default) if isinstance(default, tuple) else str(default)


def given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that the user gave; an empty list is typer's way to say that there was none."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def config_of(
    flags: Mapping[str, Any],
    data: list[Path] | None = None,
    config_file: Path | None = None,
    saved: Path | None = None,
    beneath: Mapping[str, Any] | None = None,
) -> Config:
    """One config from what lies `beneath`, a run folder's saved one, a file and flags, in rising order of weight.

    Raises:
        ConfigError: unknown keys or impossible values, all told at once.
    """
    layers: list[tuple[Mapping[str, Any], str, Path]] = [(beneath, "launch", Path.cwd())] if beneath else []
    for file in (saved, config_file):
        if file is not None:
            layers.append((configs.load_file(file), str(file), file.absolute().parent))
    wanted = given(flags)
    if data:
        wanted["train_data"] = [*data, *wanted.get("train_data", [])]
    layers.append((wanted, "command line", Path.cwd()))
    return configs.resolve(*layers)


def show(config: Config, say: Reporter) -> None:
    """Prints the resolved config. It holds no secret: where a token is read from, never the token."""
    rows = []
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            value = ", ".join(str(each) for each in value)
        if field.name == "hf_token" and value:
            value = f"{STARS} (from standard input)" if value == "-" else f"{STARS} (from a file)"
        rows.append((field.metadata["kind"], field.name.replace("_", "-"), "-" if value in (None, "") else str(value)))
    say.table("Settings", ("of", "option", "value"), rows)
