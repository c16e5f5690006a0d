"""The verb `quantize`: one stage of a run folder."""

from __future__ import annotations

from typing import Annotated

import typer

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR

from .one_stage import Lean, Run, run_one_stage
from .options import Json, with_options


@with_options()
def quantize(
    run: Run = DEFAULT_OUTPUT_DIR,
    quantization: Annotated[str | None, typer.Option(help="One or more types, such as Q4_K_M,Q8_0.")] = None,
    lean: Lean = None,
    json: Json = False,
) -> int:
    """Quantize the unquantized GGUF."""
    return run_one_stage("quantize", run, json, {"quantization": quantization, "lean": lean})
