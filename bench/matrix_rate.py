"""The share of the machine's measured matrix rate that the training step reaches.

    python bench/matrix_rate.py [--rounds N] [--steps N] [--quick] [--json FILE]

What is counted and how the rate is probed stands in `operations.py`. Steps and probes take turns in one process.
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
from operations import Needed, Probe, Shape, chats_of, needed, square_rate
from training_speed import prepared_job

from kolotune.engines.native.environment import ENVIRONMENT
from kolotune.engines.native.training import Trainer
from kolotune.engines.prepared_tokens import epoch_steps

_WANTED = 75


def main() -> int:
    """Measures and tells."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="in each round")
    arguments = parser.parse_args()
    if not ENVIRONMENT.items() <= os.environ.items():  # libraries read it when they are loaded: once more, with it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    if arguments.quick:
        arguments.rounds, arguments.steps = 3, 2
    result = Result("matrix_rate", "Share of the matrix rate", versions("torch"), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as name:
        job = dataclasses.replace(prepared_job(Path(name), 40 if arguments.quick else 160), checkpoint_steps=0)
        trainer = Trainer(job)
        tokens, size = trainer.tokens, job.batch_size
        shape = Shape.read(Path(job.base_model), job.lora_rank, material.TARGETS)
        steps = list(epoch_steps(len(tokens), 0, job.seed, size))[: arguments.steps]
        trainer.step(steps[0], job.learning_rate)  # warms up
        counts = [needed(shape, chats_of(tokens, step)) for step in steps]
        rows = int(median(each.rows for each in counts))
        labels = int(median(each.labels for each in counts))
        dtype = torch.bfloat16 if job.dtype == "bf16" else torch.float32
        probe = Probe(shape, rows, labels, dtype)
        probe.rate()
        table, shares, rates = [], [], []
        for number in range(arguments.rounds):
            before = probe.rate()
            started = time.perf_counter()
            for step in steps:
                trainer.step(step, job.learning_rate)
            seconds = time.perf_counter() - started
            rate = (before + probe.rate()) / 2
            reached = sum(each.all for each in counts) / seconds
            shares.append(100 * reached / rate)
            rates.append(rate)
            table.append([number + 1, reached / 1e9, rate / 1e9, square_rate(dtype) / 1e9, shares[-1]])
    result.tables.append(_counts(counts, job.batch_size))
    columns = ["round", "step GFLOP/s", "products alone GFLOP/s", "2048 x 2048 x 2048 GFLOP/s", "share %"]
    result.tables.append(Table(f"{job.dtype}, {torch.get_num_threads()} threads", columns, table))
    result.at_least(
        f"share of the measured {job.dtype} matrix rate, needed operations alone", median(shares), _WANTED, "%"
    )
    strict = 1 - sum(each.spared for each in counts) / sum(each.all for each in counts)
    result.at_least("the same, without what the rule counts and nobody needs", strict * median(shares), _WANTED, "%")
    result.notes.append(
        f"The products alone: those of a step of {rows} rows and {labels} labels at the model's own shapes, forwards "
        "and backwards, each layer with matrices of its own; the faster of PyTorch's product and oneDNN's with packed "
        "weights. Adapters and attention are counted as operations and are not among the products probed."
    )
    result.finish(arguments.json)
    return 0


def _counts(counts: list[Needed], size: int) -> Table:
    whole = sum(each.all for each in counts)
    kinds = {
        "weights, 4 each and token": sum(each.weights for each in counts),
        "head, 4 each weight and label": sum(each.head for each in counts),
        "adapters, 6 each weight and token": sum(each.adapters for each in counts),
        "attention": sum(each.attention for each in counts),
    }
    rows = [[kind, value / len(counts) / 1e9, 100 * value / whole] for kind, value in kinds.items()]
    rows.append(["all", whole / len(counts) / 1e9, 100.0])
    title = f"Operations that a step of {size} chats needs ({sum(e.rows for e in counts) // len(counts)} rows)"
    return Table(title, ["what", "GFLOP", "%"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
