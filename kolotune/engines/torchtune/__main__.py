"""``python -m kolotune.engines.torchtune JOB``: train, and report events on standard output."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from kolotune.foundation.errors import Interrupted, TrainingError
from kolotune.runners.child_process import carry_out

from .. import events
from ..job import TrainJob


def main(arguments: list[str]) -> int:
    """Train the job in the file `arguments[0]`; return the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return carry_out(lambda: _train(Path(arguments[0])))
    except MemoryError:
        traceback.print_exc()
        events.emit(events.OutOfMemory())
        return TrainingError.exit_code
    except KeyboardInterrupt:
        return Interrupted.exit_code


def _train(job_file: Path) -> None:
    job = TrainJob.read(job_file)
    from .driver import train

    train(job)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle a request to stop like Ctrl-C, so that torchtune's process is ended too."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
