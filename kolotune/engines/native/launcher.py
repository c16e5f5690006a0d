"""Starts several processes of the engine, on this machine and others, with PyTorch's torchrun.

When a process ends too early, or a lost machine returns, torchrun restarts all of them. They resume from the newest
checkpoint that any machine has.
"""

from __future__ import annotations

import os

from kolotune.foundation import hardware
from kolotune.runners.watchdog import WATCH_STDIN

from .. import torchrun
from ..job import TrainJob
from ..process_environment import SHARDED_ENVIRONMENT

_KILLS_BEFORE = "KOLOTUNE_KILLS_BEFORE"
_FAILURES = ("ChildFailedError", "RendezvousTimeoutError", "RendezvousConnectionError")


def is_launcher(job: TrainJob) -> bool:
    """Return whether this process is to start the processes of the job, rather than train itself."""
    return job.processes > 1 and "RANK" not in os.environ


def was_restarted_for_memory() -> bool:
    """Return whether torchrun has restarted this process after the kernel killed one, most likely one of the job's.

    It would be killed again, for the same reason.
    """
    before = os.environ.get(_KILLS_BEFORE, "")
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return restarted and before.isdecimal() and hardware.kills_for_memory(own=True) != int(before)


def launch(job: TrainJob, job_file: str, *, watched: bool) -> int:
    """Start the job's processes on this machine and wait for them; return the exit code.

    Args:
        job: content of the file `job_file`.
        watched: whether this process, and so its children, must end when standard input is closed.

    Raises:
        TrainingError: the rendezvous address is invalid or unreachable.
    """
    from . import checkpointer

    if not job.resume:  # once, here: a restarted process needs the checkpoints written since
        checkpointer.clear(job)
    os.environ.update(torchrun.variables(job))
    if job.sharded:
        os.environ.update(SHARDED_ENVIRONMENT)
    os.environ[WATCH_STDIN] = str(int(watched))
    os.environ[_KILLS_BEFORE] = str(hardware.kills_for_memory(own=True))
    from torch.distributed import run

    try:
        run.main(torchrun.arguments(job, "kolotune.engines.native", job_file))
    except Exception as error:
        if type(error).__name__ not in _FAILURES:
            raise
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return 1
    return 0
