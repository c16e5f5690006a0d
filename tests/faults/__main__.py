"""The long part of the fault suite: its figures are written to docs/reliability.md.

    python tests/faults kills [--count 1000]   random kills until there were so many; goes on where it stopped
    python tests/faults calls [--every 1]      a kill at every system call that changes the run folder
    python tests/faults loop [--subject tiny --times 50]   a run that is killed until it finishes, so many times
    python tests/faults container [--count 100]  clients killed while a verb runs in the container; needs root
    python tests/faults report                 docs/reliability.md, of what was measured

What was measured is kept in KOLOTUNE_TEST_CACHE or the user's cache, until --fresh.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_COUNTS = {"kills": 1000, "container": 100}
_ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT)]

os.environ["OMP_NUM_THREADS"] = "1"

from support import docker_engine, figures  # noqa: E402 - the path comes first

from faults import containers, forking, loop, reliability, stages  # noqa: E402
from faults.campaign import Tally, campaign  # noqa: E402
from faults.room import Broken, Room  # noqa: E402

_TIMES = {"tiny": 50, "sample": 10}


def main() -> int:
    """Does what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "calls", "loop", "container", "report"))
    parser.add_argument("--count", type=int, help=f"random kills in all; default: {_COUNTS}")
    parser.add_argument("--every", type=int, default=1, help="of the calls of each stage, only every so many-th")
    parser.add_argument("--stage", action="append", choices=stages.NAMES, help="calls of this stage only")
    parser.add_argument("--subject", choices=loop.SUBJECTS, help="what is run in the loop; default: each")
    parser.add_argument("--times", type=int, help="runs that are brought to their end; default: tiny 50, sample 10")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "reliability.md", help="what is written")
    parser.add_argument("--fresh", action="store_true", help="forgets what was measured before")
    chosen = parser.parse_args()
    kept = figures.folder()
    if chosen.fresh:
        for each in kept.glob("*.json"):
            each.unlink()
    try:
        if chosen.what == "kills":
            _kills(kept / "kills.json", chosen.count or _COUNTS["kills"])
        if chosen.what == "calls":
            _calls(kept / "calls.json", chosen.stage or stages.NAMES, chosen.every)
        if chosen.what == "loop":
            for name in [chosen.subject] if chosen.subject else loop.SUBJECTS:
                _loop(kept, name, chosen.times or _TIMES[name])
        if chosen.what == "container":
            _container(kept / "container.json", chosen.count or _COUNTS["container"])
    except Broken as error:
        print(f"broken: {error}")
        return 1
    finally:
        chosen.page.write_text(reliability.page(kept), encoding="utf-8")
    return 0


@contextmanager
def _room() -> Iterator[Room]:
    """A room in memory where that can be had: a killed process loses nothing that it has handed to the system."""
    memory = Path("/dev/shm")
    with _folder(memory if memory.is_dir() else None) as root:
        room = Room.make(root / "room")
        forking.load()
        yield room


@contextmanager
def _folder(where: Path | None = None) -> Iterator[Path]:
    """A folder of its own, which stays when a promise was broken."""
    root = Path(tempfile.mkdtemp(prefix="kolotune-faults-", dir=where))
    try:
        yield root
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


def _container(file: Path, count: int) -> None:
    if why := docker_engine.why_not():
        print(f"no container: {why}")
        return
    tally = containers.Tally.read(file)

    def keep(so_far: containers.Tally) -> None:
        so_far.write(file)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {so_far.kills} kills, {so_far.runs} runs through, {so_far.longest:.1f} s at most", flush=True)

    with tempfile.TemporaryDirectory(prefix="kolotune-faults-") as folder, docker_engine.engine() as client:
        docker_engine.build(client)
        containers.campaign(client, Room.make(Path(folder, "room"), reference=False), tally, count, keep)


def _calls(file: Path, names: list[str], every: int) -> None:
    found = figures.read(file)
    with _room() as room:
        for name in names:
            points, killed = stages.at_every_call(room, name, every)
            found[name] = {"points": points, "killed": killed, "every": every}
            figures.write(file, found)
            print(f"{name}: {points} calls, killed at {killed}", flush=True)


def _loop(kept: Path, name: str, times: int) -> None:
    file = kept / f"loop-{name}.json"

    def keep(so_far: loop.Loops) -> None:
        so_far.write(file)
        print(f"{name}: {so_far.times} runs through, {so_far.kills} kills", flush=True)

    with _folder() as root:
        loop.until_through(loop.SUBJECTS[name](root), root, loop.Loops.read(file), times, keep)


if __name__ == "__main__":
    sys.exit(main())
