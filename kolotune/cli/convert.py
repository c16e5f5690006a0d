"""The verb `convert`: one stage of a run folder."""

from __future__ import annotations

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR

from .one_stage import Lean, Run, run_one_stage
from .options import Json, with_options


@with_options()
def convert(run: Run = DEFAULT_OUTPUT_DIR, lean: Lean = None, json: Json = False) -> int:
    """Convert the merged model to an unquantized GGUF."""
    return run_one_stage("convert", run, json, {"lean": lean})
