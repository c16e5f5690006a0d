"""The verb `quantize`: one stage of a run folder."""

from __future__ import annotations

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR

from .one_stage import run_one_stage
from .options import with_options
from .parameters import Json, Run


@with_options()
def quantize(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: object) -> int:
    """Quantize the unquantized GGUF."""
    return run_one_stage("quantize", run, json, flags)
