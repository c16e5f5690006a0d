"""Trainings in processes that are killed at a step."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from kolotune.engines.events import StepDone, event_in
from kolotune.engines.job import TrainJob


def start(job: TrainJob) -> subprocess.Popen[str]:
    """Start a training; its events are on its standard output."""
    path = Path(job.metrics).with_name("job.json")
    job.write(path)
    argv = [sys.executable, "-m", "kolotune.engines.native", str(path)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def kill_after(job: TrainJob, step: int) -> None:
    """Train until a step is done, then kill the process."""
    child = start(job)
    assert child.stdout is not None
    for line in child.stdout:
        event = event_in(line)
        if isinstance(event, StepDone) and event.step >= step:
            child.kill()
            break
    child.stdout.close()
    assert child.wait(60) == -signal.SIGKILL
