"""How much faster two processes train than one, each with one thread, on two cores.

    python bench/scaling.py [--rounds N] [--steps N] [--quick] [--json FILE]

`kolotune train` on the same prepared chats with the same batches; it is ended after so many steps, the first of which
are left out. The speed is that of all processes together.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import material
from growth import prepared, trained
from measuring import Result, Table, median, options, versions

_CHATS, _BATCH, _LEAST = 200, 16, 1.8


def main() -> int:
    """Measures and tells."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 5
    result = Result("scaling", "Processes that train together", versions("torch"), quick=arguments.quick)
    speeds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(prefix="kolotune-bench-") as folder:
        root = Path(folder)
        run = prepared(root / "run", material.chats(root / "chats", _CHATS).train, 2_048)
        for number in range(arguments.rounds):
            for processes, found in speeds.items():
                one = trained(run, _BATCH, arguments.steps, "--nproc", str(processes), threads=1, memory=False)
                found.append(one.tokens_per_second)
                print(f"round {number + 1}, {processes} processes: {found[-1]:.0f} tokens/s", flush=True)
    found = {processes: median(each) for processes, each in speeds.items()}
    rows = [[processes, speed, speed / found[1]] for processes, speed in found.items()]
    title = f"SmolLM2-135M in bf16, one thread each, batches of {_BATCH}, {arguments.steps} steps, medians"
    result.tables.append(Table(title, ["processes", "tokens/s", "of one process"], rows))
    result.at_least("2 processes of one thread against 1 process of one thread", found[2] / found[1], _LEAST)
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
