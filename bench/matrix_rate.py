"""The share of the machine's measured matrix rate that a training step reaches.

    python bench/matrix_rate.py [--rounds N] [--steps N] [--dtype bf16|fp32] [--quick] [--json FILE]

The dtype is the one that a training has on this processor. `operations.py` says what is counted and how the rate is
measured. Steps and probes take turns in one process.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

import material
import torch
from measuring import Result, Table, median, options, versions
from operations import MatrixProbe, Operations, Shape, chats_of, count_operations, square_rate
from training_speed import prepared_job

from kolotune.engines.native.trainer import Trainer
from kolotune.engines.prepared_tokens import epoch_steps
from kolotune.engines.process_environment import ENVIRONMENT
from kolotune.foundation.hardware import best_dtype

_TARGET_PERCENT = 85


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps in each round")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=best_dtype())
    arguments = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():  # libraries read it when they are loaded, so start again with it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    if arguments.quick:
        arguments.rounds, arguments.steps = 3, 2
    result = Result("matrix_rate", "Share of the matrix rate", versions("torch"), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as name:
        job = dataclasses.replace(prepared_job(Path(name), 40 if arguments.quick else 160), checkpoint_steps=0)
        job = dataclasses.replace(job, dtype=arguments.dtype)
        trainer = Trainer(job)
        tokens, size = trainer.tokens, job.batch_size
        shape = Shape.read(Path(job.base_model), job.lora_rank, material.TARGETS)
        steps = list(epoch_steps(len(tokens), 0, job.seed, size))[: arguments.steps]
        trainer.step(steps[0], job.learning_rate)  # warms up
        counts = [count_operations(shape, chats_of(tokens, step)) for step in steps]
        rows = int(median(count.rows for count in counts))
        labels = int(median(count.labels for count in counts))
        dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
        probe = MatrixProbe(shape, rows, labels, dtype)
        probe.rate()
        table, shares, rates = [], [], []
        for number in range(arguments.rounds):
            before = probe.rate()
            started = time.perf_counter()
            for step in steps:
                trainer.step(step, job.learning_rate)
            seconds = time.perf_counter() - started
            rate = (before + probe.rate()) / 2
            reached = sum(count.all for count in counts) / seconds
            shares.append(100 * reached / rate)
            rates.append(rate)
            table.append([number + 1, reached / 1e9, rate / 1e9, square_rate(dtype) / 1e9, shares[-1]])
    result.tables.append(_counts(counts, job.batch_size))
    columns = ["round", "step GFLOP/s", "matrix products only GFLOP/s", "2048 x 2048 x 2048 GFLOP/s", "share %"]
    result.tables.append(Table(f"{job.dtype}, {torch.get_num_threads()} threads", columns, table))
    result.at_least(
        f"share of the measured {job.dtype} matrix rate, counting required operations",
        median(shares),
        _TARGET_PERCENT,
        "%",
    )
    strict = 1 - sum(count.unneeded for count in counts) / sum(count.all for count in counts)
    result.at_least(
        "the same, without counted operations that are not needed", strict * median(shares), _TARGET_PERCENT, "%"
    )
    result.notes.append(
        f"Matrix products only: those of the forward and backward pass of a step with {rows} rows and {labels} labels, "
        "at the model's own shapes and with separate matrices for each layer; the faster of PyTorch's product and "
        "oneDNN's with packed weights. Adapters and attention count as operations but are not probed."
    )
    result.finish(arguments.json)
    return 0


def _counts(counts: list[Operations], size: int) -> Table:
    total = sum(count.all for count in counts)
    kinds = {
        "weights: 4 per weight and token": sum(count.weights for count in counts),
        "head: 4 per weight and label": sum(count.head for count in counts),
        "adapters: 6 per weight and token": sum(count.adapters for count in counts),
        "attention": sum(count.attention for count in counts),
    }
    rows = [[kind, value / len(counts) / 1e9, 100 * value / total] for kind, value in kinds.items()]
    rows.append(["all", total / len(counts) / 1e9, 100.0])
    title = f"Operations of a step of {size} chats ({sum(count.rows for count in counts) // len(counts)} rows)"
    return Table(title, ["what", "GFLOP", "%"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
