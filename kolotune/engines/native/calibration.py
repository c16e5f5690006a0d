"""``python -m kolotune.engines.native.calibration JOB``: train some real steps of a job, and measure them.

The job is that of the training, except for the folders that it writes to. The answer is one event, `Calibration`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.hardware import peak_memory
from kolotune.runners.child_process import carry_out

from .. import events
from ..events import Calibration
from ..job import TrainJob

if TYPE_CHECKING:
    from ..prepared_tokens import PreparedTokens
    from .trainer import Trainer

_SEARCHED_STEPS = 500  # of the first epoch, for typical ones
_TYPICAL_STEPS = 2


def calibrate(job: TrainJob) -> Calibration:
    """Train some steps, evaluate a few chats and write one checkpoint.

    The first step is the one with most tokens: it warms up, and shows the peak of memory. The steps that are timed
    are those closest to the mean.
    """
    import psutil

    from ..prepared_tokens import epoch_steps
    from .trainer import Trainer

    trainer = Trainer(job)
    tokens, held_out = trainer.tokens, trainer.held_out
    start = time.time() - psutil.Process().create_time()
    size = job.batch_size * job.gradient_accumulation
    steps = list(islice(epoch_steps(len(tokens), 0, job.seed, size), _SEARCHED_STEPS))

    def weight(step: Sequence[int]) -> int:
        return sum(tokens.chat_length(index) for index in step)

    mean = sum(map(weight, steps)) / len(steps)
    first = _seconds(partial(trainer.step, max(steps, key=weight), job.learning_rate))
    typical = sorted(steps, key=lambda step: abs(weight(step) - mean))[:_TYPICAL_STEPS]
    seconds = [_seconds(partial(trainer.step, step, job.learning_rate)) for step in typical]
    per_held_out_token = 0.0
    if held_out is not None and len(held_out):
        chats = _typical_chats(held_out)
        groups = trainer.model.groups(held_out, chats)
        evaluation = sum(_seconds(partial(_read_loss, trainer, held_out, group)) for group in groups)
        per_held_out_token = evaluation / sum(map(held_out.chat_length, chats))
    checkpoint = _seconds(partial(_save_checkpoint, job, trainer))
    memory, mapped = peak_memory()
    return Calibration(
        start=start,
        first=first,
        per_token=sum(seconds) / sum(map(weight, typical)),
        per_held_out_token=per_held_out_token,
        checkpoint=checkpoint,
        device=trainer.device,
        memory=memory,
        mapped=mapped,
    )


def _typical_chats(tokens: PreparedTokens) -> list[int]:
    """Return chats of medium length, as many as are computed at once."""
    from ..prepared_tokens import longest_first
    from .sequence_packing import TOKEN_BUDGET

    order = longest_first(tokens)
    first = len(order) // 2
    ends = accumulate(map(tokens.chat_length, order[first:]))
    return order[first : first + max(1, sum(1 for _ in takewhile(lambda end: end <= TOKEN_BUDGET, ends)))]


def _read_loss(trainer: Trainer, held_out: PreparedTokens, group: Sequence[int]) -> float:
    """Return the loss of a group; a GPU has computed it once it is read."""
    return float(trainer.model.loss(held_out, group))


def _save_checkpoint(job: TrainJob, trainer: Trainer) -> None:
    from . import checkpointer

    checkpointer.save(job, trainer.snapshot())


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main(arguments: list[str]) -> int:
    """Measure the job in the file `arguments[0]`; return the exit code."""
    return carry_out(lambda: events.emit(calibrate(TrainJob.read(Path(arguments[0])))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
