"""The verb `init`: starter chats and a commented config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation.config import OPTIONS, Config, Group, Kind, dump
from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.errors import ConfigError

from .hints import CHATS_NAME, CONFIG_NAME
from .options import reporter
from .parameters import FileRole


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to create or fill."), FileRole.NEW_FOLDER] = Path("."),
) -> int:
    """Write starter chats and a commented config into a folder."""
    import importlib.resources

    from kolotune.foundation.files import write_text

    chats = importlib.resources.files("kolotune.chats.starter").joinpath(CHATS_NAME).read_text(encoding="utf-8")
    files = {folder / CHATS_NAME: chats, folder / CONFIG_NAME: commented_config()}
    for path in files:
        if path.exists():
            raise ConfigError(f"{path}: already exists", "Name another folder; nothing is overwritten.")
    for path, text in files.items():
        write_text(path.absolute(), text)
    say = reporter()
    say.success(f"wrote {' and '.join(str(path) for path in files)}")
    say.note(f"Put your own chats into {folder / CHATS_NAME}, then:")
    say.note(f"  kolotune check {folder / CHATS_NAME}")
    say.note(f"  kolotune run --config {folder / CONFIG_NAME}")
    return 0


def commented_config() -> str:
    """Return a config file that names every option with its default; all but the training data is commented out."""
    defaults = dump(Config())
    values = {line.split(":")[0]: line for line in defaults.splitlines() if not line.startswith((" ", "-"))}
    lines = [
        "# Options of a kolotune run, with their defaults; `kolotune run --help` lists them too.",
        "# Uncomment what you want to change.",
        "",
    ]
    group: Group | None = None
    for name, option in OPTIONS.items():
        if option.kind is Kind.SECRET_SOURCE:
            continue
        if option.group is not group:
            group = option.group
            lines += [f"# --- {group.title}", ""]
        lines.append(f"# {option.help}")
        for engine, entry in ENGINES.items():
            if name in entry.defaults:
                lines.append(f"# With engine: {engine} the default is {_plain(entry.defaults[name])}.")
        if name == "train_data":
            lines += [f"train_data: [{CHATS_NAME}]", ""]
            continue
        lines += [f"#{_example(name, option.default, values)}", ""]
    return "\n".join(lines)


def _plain(default: object) -> str:
    """Return a default as YAML writes it."""
    return f"[{', '.join(str(each) for each in default)}]" if isinstance(default, tuple) else str(default)


def _example(name: str, default: object, values: dict[str, str]) -> str:
    if isinstance(default, tuple):
        return f"{name}: {_plain(default)}"
    if isinstance(default, Path):
        return f"{name}: {default}"
    return values.get(name, f"{name}:")
