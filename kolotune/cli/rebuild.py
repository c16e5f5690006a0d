"""The verb `rebuild`: repeat a run and compare the results."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kolotune.foundation.errors import ManifestError
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import FileRole, Json


def rebuild(
    manifest: Annotated[Path, typer.Argument(help="The manifest.json of a run."), FileRole.INPUT],
    output_dir: Annotated[
        Path | None, typer.Option(help="The new run folder.", show_default="RUN-rebuilt"), FileRole.RUN_FOLDER
    ] = None,
    json: Json = False,
) -> int:
    """Repeat a run from its manifest and compare the results."""
    from kolotune.runs import rebuild as rebuilding

    say = reporter(json)
    file = Path(os.path.abspath(manifest / RunFolder(manifest).manifest.name if manifest.is_dir() else manifest))
    folder = output_dir or file.parent.with_name(f"{file.parent.name}-rebuilt")
    rebuilt = rebuilding.rebuild(file, Path(os.path.abspath(folder)), say)
    if rebuilt.changes:
        say.table("What differs from the original run", ("what", "then", "now"), rebuilt.changes)
    if rebuilt.different:
        for name in rebuilt.different:
            say.warning(f"{name} differs")
        raise ManifestError(
            f"{rebuilt.folder.root}: {len(rebuilt.different)} of {len(rebuilt.same) + len(rebuilt.different)} results "
            "differ from the manifest",
            "The same versions, processor and threads give the same bytes; the table shows which of them differ."
            if rebuilt.changes
            else "Versions and machine are the same. On a GPU, and with torchtune, results vary from run to run.",
        )
    say.success(f"{rebuilt.folder.root}: all {len(rebuilt.same)} results have the same hash")
    return 0
