"""What the first run on a machine downloads, compiles and proves, at the same time: each waits for a core or others."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import partial

from kolotune import llamacpp
from kolotune.engines.engine import get_engine
from kolotune.fidelity import computation_gate
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.stage import Context, Stage
from kolotune.runners.meanwhile import done_meanwhile
from kolotune.stages import convert, quantize, train


def fetched_meanwhile(
    config: Config, folder: RunFolder, names: Collection[str], reporter: Reporter
) -> AbstractContextManager[None]:
    """Compile the training step and download llama.cpp's converter in the block, for a folder where nothing is trained.

    Args:
        config: of the run.
        folder: the run folder.
        names: the stages that may run.
        reporter: shows what is downloaded.
    """
    if train.NAME not in names or folder.record(train.NAME).exists():
        return done_meanwhile([])
    engine = get_engine(config.engine)
    dtype = hardware.best_dtype() if config.dtype == "auto" else config.dtype
    compiles = config.compile == "auto" and engine.has_compiled_step
    converts = convert.NAME in names or quantize.NAME in names
    return done_meanwhile(
        [partial(engine.can_compile, dtype)] * compiles + [partial(llamacpp.ensure, reporter)] * converts
    )


def proven_meanwhile(stages: Collection[Stage], context: Context, reporter: Reporter) -> AbstractContextManager[None]:
    """Compare llama.cpp with transformers in the block, if that is checked before these stages."""
    checks = train in stages and (convert in stages or quantize in stages)
    return done_meanwhile([partial(computation_gate.find_run_proof, context, reporter)] * checks)
