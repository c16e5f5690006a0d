"""``python -m kolotune.engines.native.calibration JOB``: some real steps of a job, and how long they took.

The job is that of the training, but for the folders that it writes into. Answers with one event, ``measured``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.hardware import peak_memory
from kolotune.runners.watchdog import end_with_parent

from ..job import TrainJob, emit

if TYPE_CHECKING:
    from .training import Trainer

_LOOKED_AT = 500  # steps of the first epoch among which typical ones are looked for
_STEPS = 2


def measured(job: TrainJob) -> dict[str, Any]:
    """Trains some steps, evaluates one group and writes one checkpoint.

    The first step is the one with most tokens: it warms up, and shows the memory at its peak. Those that count are the
    ones nearest to the mean step.

    Returns:
        Seconds: ``start`` from the process's beginning to the first step, ``first`` of that step, ``per_token`` of
        later ones, ``per_held_out_token``, ``checkpoint``; ``device``; and bytes: ``memory``, ``mapped`` (see
        `hardware.peak_memory`).
    """
    import psutil

    from ..prepared_tokens import epoch_steps, longest_first
    from .training import Trainer

    trainer = Trainer(job)
    tokens, held_out = trainer.tokens, trainer.held_out
    start = time.time() - psutil.Process().create_time()
    size = job.batch_size * job.gradient_accumulation
    steps = [step for _, step in zip(range(_LOOKED_AT), epoch_steps(len(tokens), 0, job.seed, size), strict=False)]

    def weight(step: Sequence[int]) -> int:
        return sum(tokens.chat_length(index) for index in step)

    mean = sum(map(weight, steps)) / len(steps)
    first = _seconds(partial(trainer.step, max(steps, key=weight), job.learning_rate))
    typical = sorted(steps, key=lambda step: abs(weight(step) - mean))[:_STEPS]
    took = [_seconds(partial(trainer.step, step, job.learning_rate)) for step in typical]
    found = {
        "start": start,
        "first": first,
        "per_token": sum(took) / sum(map(weight, typical)),
        "per_held_out_token": 0.0,
        "device": trainer.device,
    }
    if held_out is not None and len(held_out):
        groups = trainer.model.groups(held_out, longest_first(held_out))
        group = groups[len(groups) // 2]
        took_it = _seconds(partial(trainer.model.loss, held_out, group))
        found["per_held_out_token"] = took_it / sum(held_out.chat_length(index) for index in group)
    found["checkpoint"] = _seconds(partial(_checkpoint, job, trainer))
    found["memory"], found["mapped"] = peak_memory()
    return found


def _checkpoint(job: TrainJob, trainer: Trainer) -> None:
    from . import checkpoints

    checkpoints.save(job, trainer.snapshot())


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    """Measures the job in the file `arguments[0]`; returns the exit code."""
    end_with_parent()
    try:
        emit("measured", **measured(TrainJob.read(Path(arguments[0]))))
    except KolotuneError as error:
        emit("error", kind=type(error).__name__, cause=error.cause, hint=error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
