"""How soon `kolotune --help` and `kolotune status` answer.

    python bench/answering.py [--runs N] [--quick] [--json FILE]

`status` is asked about the folder of a whole run of the sample's kind. The first answer of each is left out.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

import material
from measuring import KOLOTUNE, Result, Table, measure, median, options, versions


def seconds(argv: list[str], runs: int) -> list[float]:
    """Wall times of a command that has been run once before."""
    found = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(argv, check=True, capture_output=True)
        found.append(time.perf_counter() - started)
    return found[1:]


def main() -> int:
    """Measures and tells."""
    parser = options(__doc__)
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    runs = 5 if arguments.quick else arguments.runs
    result = Result("answering", "Answering", versions("typer", "rich"), quick=arguments.quick)
    with tempfile.TemporaryDirectory() as name:
        run = Path(name, "run")
        chats = material.chats(Path(name, "chats"), 8, held_out=0).train
        whole = [*KOLOTUNE, "run", chats, *material.settings(), "--no-compare", "--output-dir", run]
        measure(whole, Path(name, "log"), env=material.OFFLINE)
        times = {
            "kolotune --help": seconds([*KOLOTUNE, "--help"], runs),
            "kolotune status": seconds([*KOLOTUNE, "status", str(run)], runs),
        }
    rows = [[what, median(each), min(each), max(each)] for what, each in times.items()]
    result.tables.append(Table(f"{runs} runs each", ["command", "median s", "least", "most"], rows))
    result.at_most("kolotune --help", median(times["kolotune --help"]), 0.2, " s")
    result.at_most("kolotune status", median(times["kolotune status"]), 0.4, " s")
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
