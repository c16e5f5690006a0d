"""Several processes of the engine, on this machine and others, by PyTorch's torchrun.

When one of them ends before its time, or a machine comes back, torchrun starts all of them again, and they go on from
the newest checkpoint that any machine has.
"""

from __future__ import annotations

import os

from kolotune.foundation import hardware
from kolotune.runners.watchdog import WATCH_STDIN

from .. import torchrun
from ..job import TrainJob
from .environment import LEAN

_KILLS_BEFORE = "KOLOTUNE_KILLS_BEFORE"


def is_wanted(job: TrainJob) -> bool:
    """Whether several processes train, and this is none of them."""
    return job.nproc * job.nnodes > 1 and "RANK" not in os.environ


def one_was_killed_for_memory() -> bool:
    """Whether torchrun has started this process anew, and the kernel has killed one since it began: likely one of ours.

    It would be killed again, for the same reason.
    """
    before = os.environ.get(_KILLS_BEFORE, "")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return again and before.isdecimal() and hardware.kills_for_memory(own=True) != int(before)


def launch(job: TrainJob, job_file: str, *, watched: bool) -> int:
    """Starts the job's processes of this machine and waits for their end; returns the exit code.

    Args:
        job: in the file `job_file`.
        watched: whether the end of standard input is the end of this process, and so of those.

    Raises:
        TrainingError: the address where machines meet can't be made out.
    """
    from . import checkpoints

    if not job.resume:  # here, once: a process that is started again finds what was trained since
        checkpoints.clear(job)
    os.environ.update(torchrun.variables(job))
    if job.sharded:
        os.environ.update(LEAN)
    os.environ[WATCH_STDIN] = str(int(watched))
    os.environ[_KILLS_BEFORE] = str(hardware.kills_for_memory(own=True))
    from torch.distributed import run

    try:
        run.main(torchrun.arguments(job, "kolotune.engines.native", job_file))
    except Exception as error:
        if type(error).__name__ not in ("ChildFailedError", "RendezvousTimeoutError", "RendezvousConnectionError"):
            raise
        print(f"{type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return 1
    return 0
