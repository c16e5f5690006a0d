"""The verb `status`: which stages are done, and why the others will run."""

from __future__ import annotations

from typing import Annotated

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.run_folder.layout import RunFolder

from .options import reporter
from .parameters import Json, Run


def status(
    run: Run = DEFAULT_OUTPUT_DIR,
    why: Annotated[bool, typer.Option("--why", help="Show every reason, not only the first.")] = False,
    json: Json = False,
) -> int:
    """Show the stages of a run: done, or the reason that they will run."""
    from kolotune.pipeline.status import read_status

    rows = [
        (stage.name, stage.state, "; ".join(stage.explanations()[: None if why else 1]))
        for stage in read_status(RunFolder(run.absolute()))
    ]
    reporter(json).table(str(run), ("stage", "state", "why"), rows)
    return 0
