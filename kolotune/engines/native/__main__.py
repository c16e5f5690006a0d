"""``python -m kolotune.engines.native JOB``: trains, and answers with events on standard output."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from pathlib import Path

from ...errors import KolotuneError, TrainingError
from ...runners.watchdog import end_with_parent
from ..job import TrainJob, emit
from . import elastic


def main(arguments: list[str]) -> int:
    """Runs the job in the file `arguments[0]`; returns the exit code."""
    watches = end_with_parent()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        job = TrainJob.read(Path(arguments[0]))
        if elastic.is_wanted(job):
            return elastic.launch(job, arguments[0], watched=watches)
        from .training import train

        train(job)
    except KolotuneError as error:
        traceback.print_exc()
        emit("error", kind=type(error).__name__, cause=error.cause, hint=error.hint)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if type(error).__name__ != "OutOfMemoryError":
            raise
        emit(
            "error",
            kind=TrainingError.__name__,
            cause="the GPU is out of memory",
            hint="Halve --batch-size and double --gradient-accumulation (same result), or add --load-in-4bit.",
        )
        return TrainingError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
