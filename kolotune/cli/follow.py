"""The verb `follow`: what a launched job reports, and its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import FileRole, Json

if TYPE_CHECKING:
    from kolotune.launching.launcher import LaunchedJob, Launcher

LaunchedRun = Annotated[
    Path, typer.Argument(help="The run folder that the job was launched from."), FileRole.RUN_FOLDER
]


def follow(
    run: LaunchedRun = DEFAULT_OUTPUT_DIR,
    fetch: Annotated[bool, typer.Option("--fetch/--no-fetch", help="Fetch the results at the end.")] = True,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the job ends and show what it reports.")
    ] = True,
    json: Json = False,
) -> int:
    """Show what a launched job reports; fetch its results."""
    from kolotune.launching.registry import launched_job

    say = reporter(json)
    folder = RunFolder(run.absolute())
    launcher, job = launched_job(folder)
    return follow_job(launcher, job, folder, say, wait=wait, fetch=fetch)


def follow_job(
    launcher: Launcher, job: LaunchedJob, folder: RunFolder, say: Reporter, *, wait: bool, fetch: bool
) -> int:
    """Show what a job reports until it ends, then fetch its results; return its exit code."""
    code = launcher.follow(job, say) if wait else 0
    if fetch:
        fetched = [name for name in launcher.fetch(job, folder, say) if not name.startswith(".")]
        if fetched:
            say.note(f"fetched to {folder.root}: {', '.join(fetched)}")
    return code
