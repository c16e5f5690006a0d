"""The verb `convert`: one stage of a run folder."""

from __future__ import annotations

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR

from .one_stage import run_one_stage
from .options import with_options
from .parameters import Json, Run


@with_options()
def convert(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: object) -> int:
    """Convert the merged model to an unquantized GGUF."""
    return run_one_stage("convert", run, json, flags)
