"""The verb `clean`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.errors import ConfigError
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import Json, Run

if TYPE_CHECKING:
    from kolotune.runs.clean import FreeableFile


def clean(
    run: Run = DEFAULT_OUTPUT_DIR,
    all_but_adapter: Annotated[
        bool, typer.Option("--all-but-adapter", help="Also free the quantized GGUFs; `quantize` makes them again.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Free kolotune's cache instead: a kind that `runs --cache` lists, or all."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be freed; free nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> int:
    """Delete files that the run can make again; asks first."""
    from kolotune.foundation.files import remove
    from kolotune.pipeline.lock import locked
    from kolotune.runs.clean import CACHES, find_caches, find_freeable, free

    say = reporter(json)
    if cache is not None:
        items = [item for item in find_caches() if cache in ("all", item.path.name)]
        if not items and cache not in ("all", *CACHES):
            raise ConfigError(f"--cache: unknown kind {cache!r}", f"Use one of {', '.join(CACHES)}, all.")
        if _is_wanted(items, say, dry_run, yes):
            for item in items:
                remove(item.path)
            say.success(f"freed {format_size(sum(item.size for item in items))}")
        return 0
    folder = RunFolder(run.absolute()).require()
    with locked(folder):  # while asking, too: what is shown is what is removed
        items = find_freeable(folder, all_but_adapter)
        if _is_wanted(items, say, dry_run, yes):
            free(folder, items)
            say.success(f"freed {format_size(sum(item.size for item in items))}")
    return 0


def _is_wanted(items: Sequence[FreeableFile], say: Reporter, dry_run: bool, yes: bool) -> bool:
    """Show what would be freed; return whether the user agrees."""
    if not items:
        say.success("Nothing to free")
        return False
    total = format_size(sum(item.size for item in items))
    rows = [(item.path.name, format_size(item.size), item.remake) for item in items]
    say.table(f"Can be freed: {total}", ("what", "size", "later"), rows)
    if dry_run or yes:
        return not dry_run
    if not sys.stdin.isatty():
        raise ConfigError(
            "clean: nothing was freed: there is no terminal to ask on", "Add --yes, or look first with --dry-run."
        )
    return typer.confirm(f"Free {total}?")
