"""The verbs of room: runs, clean."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from .options import Json, reporter

if TYPE_CHECKING:
    from kolotune.runs.listing import Item


def add_to(app: typer.Typer) -> None:
    """Adds the verbs of this module."""
    for verb in (runs, clean):
        app.command()(verb)


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look; a few levels below it too.")] = Path("."),
    cache: Annotated[bool, typer.Option("--cache", help="Show what kolotune keeps in its cache, too.")] = False,
    json: Json = False,
) -> int:
    """Runs in a folder: state (as recorded; `status` looks closer), size, age, held-out loss."""
    from kolotune.runs import listing

    say = reporter(json)
    rows = [
        (
            str(each.folder.root),
            each.base or "-",
            each.state,
            format_size(each.size),
            _age_in_words(each.age),
            "-" if each.held_out_loss is None else f"{each.held_out_loss:.4f}",
        )
        for each in listing.runs_below(folder)
    ]
    if rows:
        say.table(f"Runs in {folder}", ("run", "base", "state", "size", "last change", "held-out loss"), rows)
    else:
        say.note(f"there are no runs in {folder.absolute()} or a few levels below it")
    if cache:
        caches = [(each.path.name, format_size(each.size), each.again) for each in listing.caches()]
        say.table("Cache, freed with: kolotune clean --cache KIND", ("kind", "size", "what"), caches)
    return 0


def _age_in_words(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago"
    return "just now"


def clean(
    run: Annotated[Path, typer.Argument(help="The run folder.")] = DEFAULT_OUTPUT_DIR,
    all_but_adapter: Annotated[
        bool,
        typer.Option("--all-but-adapter", help="The quantized GGUFs too; the run can't be served until `quantize`."),
    ] = False,
    cache: Annotated[
        Optional[str],  # noqa: UP045 - typer reads annotations at run time
        typer.Option(metavar="KIND", help="Not a run but kolotune's cache: a kind that `runs --cache` shows, or all."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be freed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    json: Json = False,
) -> int:
    """Frees what a run can make again: checkpoints, merged model, unquantized GGUF. Shows it, and asks first."""
    from kolotune.foundation.files import remove
    from kolotune.pipeline import run as pipeline
    from kolotune.runs import listing

    say = reporter(json)
    if cache is not None:
        items = [each for each in listing.caches() if cache in ("all", each.path.name)]
        if not items and cache not in ("all", *listing.CACHES):
            raise ConfigError(f"cache: there is no kind {cache!r}", f"Known are {', '.join(listing.CACHES)}, and all.")
        if _is_wanted(items, say, dry_run, yes):
            for each in items:
                remove(each.path)
            say.success(f"freed {format_size(sum(each.size for each in items))}")
        return 0
    folder = RunFolder(run.absolute()).require()
    with pipeline.locked(folder):  # also while it asks: what is shown is what goes
        items = listing.freeable(folder, all_but_adapter)
        if _is_wanted(items, say, dry_run, yes):
            listing.free(folder, items)
            say.success(f"freed {format_size(sum(each.size for each in items))}")
    return 0


def _is_wanted(items: Sequence[Item], say: Reporter, dry_run: bool, yes: bool) -> bool:
    """Shows what would be freed; whether the user wants it."""
    if not items:
        say.success("there is nothing to free")
        return False
    total = format_size(sum(each.size for each in items))
    rows = [(each.path.name, format_size(each.size), each.again) for each in items]
    say.table(f"Can be freed: {total}", ("what", "size", "later"), rows)
    if dry_run or yes:
        return not dry_run
    if not sys.stdin.isatty():
        raise ConfigError("clean: nothing was freed, because nobody can be asked here", "Give --yes, or --dry-run.")
    return typer.confirm(f"Free {total}?")
