"""Time the steps of several trainings in turns, in one process: the same step of each, then the next step.

    python bench/step_times.py RESULT STEPS JOB ...

RESULT gets a list of seconds for each JOB, as JSON. The first step of each is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path

from kolotune.engines.job import TrainJob
from kolotune.engines.native.trainer import Trainer
from kolotune.engines.prepared_tokens import epoch_steps


def main(arguments: list[str]) -> int:
    """Train, and write the times."""
    result, steps, *files = arguments
    trainers = [Trainer(TrainJob.read(Path(file))) for file in files]
    times: list[list[float]] = [[] for _ in trainers]
    first = trainers[0]
    for indices in islice(epoch_steps(len(first.tokens), 0, first.job.seed, first.job.batch_size), int(steps) + 1):
        for trainer, seconds in zip(trainers, times, strict=True):
            started = time.perf_counter()
            trainer.step(indices, trainer.job.learning_rate)
            seconds.append(time.perf_counter() - started)
    Path(result).write_text(json.dumps([seconds[1:] for seconds in times]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
