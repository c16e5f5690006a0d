"""Speedup of training with two processes over one, with one thread each, on two cores.

    python bench/scaling.py [--rounds N] [--steps N] [--quick] [--json FILE]

`kolotune train` runs on the same prepared chats with the same batches. It is stopped after a number of steps, and the
first steps are not counted. The speed is that of all processes together.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import material
from growth import prepare_run, train_steps
from measuring import Result, Table, median, options, versions

_CHATS, _BATCH, _TARGET = 200, 16, 1.8


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 5
    result = Result("scaling", "Several processes", versions("torch"), quick=arguments.quick)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="kolotune-bench-") as folder:
        root = Path(folder)
        run = prepare_run(root / "run", material.chats(root / "chats", _CHATS).train, 2_048)
        for number in range(arguments.rounds):
            for processes, measured in speeds.items():
                training = train_steps(run, _BATCH, arguments.steps, "--nproc", str(processes), threads=1, memory=False)
                measured.append(training.tokens_per_second)
                print(f"round {number + 1}, {processes} processes: {measured[-1]:.0f} tokens/s", flush=True)
    medians = {processes: median(measured) for processes, measured in speeds.items()}
    rows = [[processes, speed, speed / medians[1]] for processes, speed in medians.items()]
    title = f"SmolLM2-135M in bf16, one thread each, batches of {_BATCH}, {arguments.steps} steps, medians"
    result.tables.append(Table(title, ["processes", "tokens/s", "relative to one process"], rows))
    result.at_least("2 processes with one thread each, relative to 1", medians[2] / medians[1], _TARGET)
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
