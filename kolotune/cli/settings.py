"""Show the settings of a run before it starts: what was given or chosen, and with --verbose everything."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import typer

from kolotune.foundation.config import OPTIONS, Config, Kind, Option
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import STARS

Verbose = Annotated[bool, typer.Option("--verbose", help="Show all settings, not only those given or chosen.")]
_ALWAYS_SHOWN = frozenset({"train_data", "base_model", "output_dir"})


def show_settings(config: Config, say: Reporter, given: Collection[str] = (), *, verbose: bool = False) -> None:
    """Show the options that were given or differ from their default; with `verbose` all of them.

    They hold no secret, only where one is read.
    """
    rows = [
        (option.group.title, name.replace("_", "-"), _format_value(option, getattr(config, name)))
        for name, option in OPTIONS.items()
        if verbose or name in _ALWAYS_SHOWN or name in given or getattr(config, name) != option.default
    ]
    say.table("Settings", ("group", "option", "value"), rows)
    if not verbose:
        say.note("All other options have their defaults; --verbose shows them.")


def _format_value(option: Option, value: object) -> str:
    if isinstance(value, tuple):
        value = ", ".join(str(item) for item in value)
    if option.kind is Kind.SECRET_SOURCE and value:
        value = f"{STARS} (from standard input)" if value == "-" else f"{STARS} (from a file)"
    return "-" if value in (None, "") else str(value)
