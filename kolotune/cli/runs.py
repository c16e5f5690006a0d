"""The verb `runs`: the runs below a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation.formatting import format_size

from .options import reporter
from .parameters import FileRole, Json


def runs(
    folder: Annotated[Path, typer.Argument(help="The folder to search, a few levels deep."), FileRole.INPUT] = Path(
        "."
    ),
    cache: Annotated[bool, typer.Option("--cache", help="Also show what kolotune keeps in its cache.")] = False,
    json: Json = False,
) -> int:
    """List the runs below a folder."""
    from kolotune.runs.clean import find_caches
    from kolotune.runs.list import runs_below

    say = reporter(json)
    rows = [
        (
            str(run.folder.root),
            run.base or "-",
            run.state_text,
            format_size(run.size),
            _format_age(run.age),
            "-" if run.held_out_loss is None else f"{run.held_out_loss:.4f}",
        )
        for run in runs_below(folder)
    ]
    if rows:
        say.table(f"Runs in {folder}", ("run", "base", "state", "size", "last change", "held-out loss"), rows)
    else:
        say.note(f"No runs in {folder.absolute()} or a few levels below it.")
    if cache:
        caches = [(item.path.name, format_size(item.size), item.remake) for item in find_caches()]
        say.table("Cache, freed with: kolotune clean --cache KIND", ("kind", "size", "what"), caches)
    return 0


def _format_age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"
