"""``python -m kolotune.engines.torchtune JOB``: trains, and answers with events on standard output."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from kolotune.foundation.errors import Interrupted, KolotuneError, TrainingError
from kolotune.runners.watchdog import end_with_parent

from ..job import TrainJob, emit


def main(arguments: list[str]) -> int:
    """Runs the job in the file `arguments[0]`; returns the exit code."""
    signal.signal(signal.SIGTERM, _stop)
    end_with_parent()
    try:
        job = TrainJob.read(Path(arguments[0]))
        from .training import train

        train(job)
    except KolotuneError as error:
        traceback.print_exc()
        emit("error", kind=type(error).__name__, cause=error.cause, hint=error.hint)
        return error.exit_code
    except MemoryError:
        traceback.print_exc()
        emit("out_of_memory")
        return TrainingError.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """A request to stop ends like Ctrl-C, so that torchtune's process is ended too."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
