"""Response time of `kolotune --help` and `kolotune status`.

    python bench/answering.py [--runs N] [--quick] [--json FILE]

`status` reads the folder of a complete run. The first run of each command is not counted.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import material
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions


def seconds(argv: list[str], runs: int) -> list[float]:
    """Return the wall times of a command, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(argv, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return times[1:]


def main() -> int:
    """Measure and report."""
    parser = options(__doc__)
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    runs = 5 if arguments.quick else arguments.runs
    result = Result("answering", "Response time", versions("typer", "rich"), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        chats = material.chats(Path(name, "chats"), 8, held_out=0).train
        whole = [*KOLOTUNE, "run", chats, *material.settings(), "--no-compare", "--output-dir", run]
        measure(whole, Path(name, "log"), env=material.OFFLINE)
        times = {
            "kolotune --help": seconds([*KOLOTUNE, "--help"], runs),
            "kolotune status": seconds([*KOLOTUNE, "status", str(run)], runs),
        }
    rows = [[command, median(wall), min(wall), max(wall)] for command, wall in times.items()]
    result.tables.append(Table(f"{runs} runs each", ["command", "median s", "fastest", "slowest"], rows))
    result.at_most("kolotune --help", median(times["kolotune --help"]), 0.2, " s")
    result.at_most("kolotune status", median(times["kolotune status"]), 0.4, " s")
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
