"""``python -m kolotune.engines.native JOB``: trains, and answers with events on standard output."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
import warnings
from pathlib import Path

from kolotune.foundation.errors import KolotuneError, TrainingError
from kolotune.runners.watchdog import end_with_parent

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
        if elastic.one_was_killed_for_memory():
            emit("out_of_memory")
            return TrainingError.exit_code
        from .training import train

        train(job)
    except KolotuneError as error:
        traceback.print_exc()
        emit("error", kind=type(error).__name__, cause=error.cause, hint=error.hint)
        return error.exit_code
    except Exception as error:
        if not _ran_out_of_memory(error):
            raise
        traceback.print_exc()
        emit("out_of_memory")
        return TrainingError.exit_code
    return 0


def _ran_out_of_memory(error: Exception) -> bool:
    """Whether that is what an error says: Python, PyTorch on a GPU, on the CPU, and C++ have their own words for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(each in str(error).lower() for each in words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
