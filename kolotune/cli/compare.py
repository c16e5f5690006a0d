"""The verb `compare`: is every artifact of the run still the model that was trained?"""

from __future__ import annotations

from typing import Any

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.run_folder.layout import RunFolder

from .comparison_table import show_when_done
from .one_stage import run_one_stage
from .options import reporter, with_options
from .parameters import Json, Run
from .report import reporting


@with_options()
def compare(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: Any) -> int:
    """Check on held-out chats that all results are the trained model."""
    folder, say = RunFolder(run.absolute()), reporter(json)
    with show_when_done(folder, say), reporting(folder, say):
        return run_one_stage("compare", run, json, {**flags, "compare": True})
