"""Time the steps of one training on several forms of the same chats, in turns: a step on each, then the next step.

    python bench/step_times.py RESULT STEPS JOB PREPARED ...

RESULT gets a list of seconds for each folder PREPARED, as JSON. The first step on each is not counted.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import islice
from pathlib import Path

from kolotune.engines.job import TrainJob
from kolotune.engines.native.trainer import Trainer
from kolotune.engines.prepared_tokens import PreparedTokens, epoch_steps
from kolotune.run_folder.layout import TRAIN_TOKENS


def main(arguments: list[str]) -> int:
    """Train, and write the times."""
    result, steps, job, *folders = arguments
    trainer = Trainer(TrainJob.read(Path(job)))
    forms = [PreparedTokens.load(Path(folder, TRAIN_TOKENS)) for folder in folders]
    times: list[list[float]] = [[] for _ in forms]
    order = epoch_steps(len(forms[0]), 0, trainer.job.seed, trainer.job.batch_size)
    for indices in islice(order, int(steps) + 1):
        for trainer.tokens, seconds in zip(forms, times, strict=True):
            started = time.perf_counter()
            trainer.step(indices, trainer.job.learning_rate)
            seconds.append(time.perf_counter() - started)
    Path(result).write_text(json.dumps([seconds[1:] for seconds in times]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
