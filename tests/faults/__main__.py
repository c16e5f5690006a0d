"""The long part of the fault suite: its figures are written to docs/reliability.md.

    python tests/faults kills [--count 1000]   random kills until there were so many; goes on where it stopped
    python tests/faults calls [--every 1]      a kill at every system call that changes the run folder
    python tests/faults report                 docs/reliability.md, of what was measured

What was measured is kept in KOLOTUNE_TEST_CACHE or the user's cache, until --fresh.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT)]

os.environ["OMP_NUM_THREADS"] = "1"

from faults import forking, reliability, stages  # noqa: E402 - the path comes first
from faults.campaign import Tally, campaign  # noqa: E402
from faults.room import Broken, Room  # noqa: E402


def main() -> int:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "calls", "report"))
    parser.add_argument("--count", type=int, default=1000, help="random kills in all")
    parser.add_argument("--every", type=int, default=1, help="of the calls of each stage, only every so many-th")
    parser.add_argument("--stage", action="append", choices=stages.NAMES, help="calls of this stage only")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "reliability.md", help="what is written")
    parser.add_argument("--fresh", action="store_true", help="forgets what was measured before")
    chosen = parser.parse_args()
    kept = _kept()
    if chosen.fresh:
        for each in kept.glob("*.json"):
            each.unlink()
    try:
        if chosen.what == "kills":
            _kills(kept / "kills.json", chosen.count)
        if chosen.what == "calls":
            _calls(kept / "calls.json", chosen.stage or stages.NAMES, chosen.every)
    except Broken as error:
        print(f"broken: {error}")
        return 1
    finally:
        chosen.page.write_text(reliability.page(kept), encoding="utf-8")
    return 0


def _kept() -> Path:
    """Where figures are kept between calls."""
    root = os.environ.get("KOLOTUNE_TEST_CACHE") or Path("~/.cache/kolotune-tests").expanduser()
    folder = Path(root, "faults")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _room() -> Iterator[Room]:
    """A room in memory where that can be had: a killed process loses nothing that it has handed to the system."""
    memory = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="kolotune-faults-", dir=memory if memory.is_dir() else None))
    room = Room.make(root / "room")
    forking.load()
    try:
        yield room
    except Broken:
        print(f"left as it is: {root}")
        raise
    else:
        shutil.rmtree(root)


def _kills(file: Path, count: int) -> None:
    tally = Tally.read(file)

    def keep(so_far: Tally) -> None:
        so_far.write(file)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {so_far.kills} kills, {so_far.runs} runs through", flush=True)

    with _room() as room:
        campaign(room, tally, count, keep)


def _calls(file: Path, names: list[str], every: int) -> None:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    with _room() as room:
        for name in names:
            points, killed = stages.at_every_call(room, name, every)
            found[name] = {"points": points, "killed": killed, "every": every}
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{name}: {points} calls, killed at {killed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
