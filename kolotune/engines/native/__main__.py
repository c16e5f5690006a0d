"""``python -m kolotune.engines.native JOB``: train, and report events on standard output."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

from kolotune.foundation.errors import KolotuneError, TrainingError
from kolotune.runners.child_process import emit_error
from kolotune.runners.watchdog import end_with_parent

from .. import events
from ..job import TrainJob
from . import launcher
from .memory_errors import is_out_of_memory


def main(arguments: list[str]) -> int:
    """Train the job in the file `arguments[0]`; return the exit code."""
    watches = end_with_parent()
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        job = TrainJob.read(Path(arguments[0]))
        if launcher.is_launcher(job):
            return launcher.launch(job, arguments[0], watched=watches)
        if launcher.was_restarted_for_memory():
            events.emit(events.OutOfMemory())
            return TrainingError.exit_code
        from .training import train

        train(job)
        if job.processes > 1:
            _end_now()
    except KolotuneError as error:
        traceback.print_exc()
        emit_error(error)
        return error.exit_code
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.print_exc()
        events.emit(events.OutOfMemory())
        return TrainingError.exit_code
    return 0


def _end_now() -> NoReturn:
    """End this process without Python's cleanup.

    In it the threads of a process group can still fail, for which torchrun would restart the finished training.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
