"""The verb `train`: one stage of a run folder."""

from __future__ import annotations

from typing import Any

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR

from .one_stage import run_one_stage
from .options import with_options
from .parameters import Json, Run


@with_options()
def train(run: Run = DEFAULT_OUTPUT_DIR, json: Json = False, **flags: Any) -> int:
    """Train an adapter on the prepared tokens."""
    return run_one_stage("train", run, json, flags)
