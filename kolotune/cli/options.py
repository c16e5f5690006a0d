"""Flags made from the fields of `Config`, and how they become one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import typer

from kolotune.foundation import config as configs
from kolotune.foundation.config import OPTIONS, Config, Kind, Layer, Option
from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.reporter import Reporter, make_reporter

from .hub_data import with_downloaded_data
from .parameters import FileRole
from .piped import is_pipe, saved_pipe

_HINTS = get_type_hints(Config, include_extras=True)
_ROLES = {
    Kind.CHAT_FILES: FileRole.CHATS,
    Kind.FILE: FileRole.INPUT,
    Kind.BASE_MODEL: FileRole.BASE_MODEL,
    Kind.FOLDER: FileRole.RUN_FOLDER,
    Kind.SECRET_SOURCE: FileRole.NOT_SENT,
}


@functools.cache
def reporter(as_json: bool = False) -> Reporter:
    """Return the reporter of this process."""
    return make_reporter(as_json)


def with_options(*, more: Sequence[inspect.Parameter] = ()) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a verb that takes ``**flags``: it gets a flag for each of its options, and those of `more`.

    The verb's options are those whose `Option.verbs` name the function. A flag's own default is always None, "not
    given": defaults are in `Config`, where values are checked too, so that all wrong ones are reported at once.
    """

    def add_flags(verb: Callable[..., int]) -> Callable[..., int]:
        hints = get_type_hints(verb, include_extras=True)
        signature = inspect.signature(verb)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        flags = [_flag(name, option) for name, option in OPTIONS.items() if verb.__name__ in option.verbs]
        parameters = [*own, *more, *flags]
        verb.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return verb

    return add_flags


def _flag(name: str, option: Option) -> inspect.Parameter:
    hint = _HINTS[name]
    flag = "--" + name.replace("_", "-")
    annotation: object
    if hint is bool:
        shown = typer.Option(f"{flag}/--no-{flag[2:]}", help=_help(name, option), show_default=False)
        annotation = Annotated[bool | None, shown]
    else:
        shown = typer.Option(flag, help=_help(name, option), metavar=_metavar(hint), show_default=False)
        role = _ROLES.get(option.kind)
        is_list = option.kind.is_repeatable
        annotation = Annotated[list[str] | None, shown, role] if is_list else Annotated[str | None, shown, role]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(hint: object) -> str:
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


def _help(name: str, option: Option) -> str:
    parts = [option.help]
    if option.default is not None and option.default is not False and option.default != ():
        parts.append(f"[default: {_format_default(option.default)}]")
    for engine, entry in ENGINES.items():
        if name in entry.defaults:
            parts.append(f"[with {engine}: {_format_default(entry.defaults[name])}]")
    return " ".join(parts)


def _format_default(default: object) -> str:
    return ",".join(str(each) for each in default) if isinstance(default, tuple) else str(default)


def drop_unset(flags: Mapping[str, object]) -> dict[str, object]:
    """Return the flags that the user gave; typer marks a list without values by an empty one."""
    return {name: value for name, value in flags.items() if value is not None and value != []}


def resolve_flags(
    flags: Mapping[str, object],
    data: Sequence[Path] | None = None,
    config_file: Path | None = None,
    saved: Path | None = None,
    defaults: Mapping[str, object] | None = None,
    *,
    downloads: bool = True,
) -> Config:
    """Resolve, each overriding the one before: `defaults`, a run folder's `saved` config, a file, and flags.

    Args:
        flags: values by option; None for those not given.
        data: files of chats given as arguments.
        downloads: data sets of the hub are replaced by their files.

    Raises:
        ConfigError: unknown options and impossible values, all in one message.
    """
    layers: list[Layer] = [(defaults, "launch", Path.cwd())] if defaults else []
    for file in (saved, config_file):
        if file is not None:
            layers.append((configs.load_file(file), str(file), file.absolute().parent))
    values = drop_unset(flags)
    if saved is not None and any([each.get("start_from") for each in (values, *[layer[0] for layer in layers[1:]])]):
        # What the folder's earlier run was trained with is no wish about one that starts from an adapter.
        kept, origin, folder = layers[0]
        layers[0] = ({name: value for name, value in kept.items() if name not in configs.ADAPTER_FORM}, origin, folder)
    if data:
        more = values.get("train_data", [])
        values["train_data"] = [*data, *(more if isinstance(more, list) else [more])]
    for name in configs.option_names(kind=Kind.CHAT_FILES):
        files = values.get(name)
        if isinstance(files, list) and any(map(is_pipe, files)):
            values[name] = [saved_pipe(file) if is_pipe(file) else file for file in files]
    layers.append((values, "command line", Path.cwd()))
    config = configs.resolve(*layers)
    return with_downloaded_data(config) if downloads else config
