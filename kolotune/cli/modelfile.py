"""The verb `modelfile`: one stage of a run folder."""

from __future__ import annotations

from typing import Any

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR

from .one_stage import run_one_stage
from .options import with_options
from .parameters import Json, Run


@with_options()
def modelfile(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: Any) -> int:
    """Write a Modelfile for each GGUF."""
    return run_one_stage("modelfile", run, json, flags)
