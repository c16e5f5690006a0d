"""``python -m kolotune.engines.torchtune JOB``: train, and report events on standard output."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from kolotune.foundation.errors import Interrupted, TrainingError
from kolotune.runners import signals
from kolotune.runners.child_process import carry_out

from .. import events
from ..job import TrainJob


def main(arguments: list[str]) -> int:
    """Train the job in the file `arguments[0]`; return the exit code."""
    signals.interrupt_on_termination()  # so that torchtune's process is ended too
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
