"""The long part of the fault suite; its figures go to docs/reliability.md.

    python tests/faults kills [--count 1000]   random kills until the count is reached; resumes an earlier call
    python tests/faults calls [--every 1]      a kill at each system call that changes the run folder
    python tests/faults loop [--subject tiny --times 50]   runs that are killed until they finish
    python tests/faults container [--count 100]  clients killed while a verb runs in the container; needs root
    python tests/faults report                 docs/reliability.md, from the measurements

Measurements are kept in KOLOTUNE_TEST_CACHE or the user's cache, until --fresh.
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
from faults.workspace import BrokenPromise, Workspace  # noqa: E402

_TIMES = {"tiny": 50, "sample": 10}


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "calls", "loop", "container", "report"))
    parser.add_argument("--count", type=int, help=f"total of random kills; default: {_COUNTS}")
    parser.add_argument("--every", type=int, default=1, help="take only every Nth call of each stage")
    parser.add_argument("--stage", action="append", choices=stages.NAMES, help="only calls of this stage")
    parser.add_argument("--subject", choices=loop.SUBJECTS, help="subject of the loop; default: all")
    parser.add_argument("--times", type=int, help="number of finished runs; default: tiny 50, sample 10")
    parser.add_argument("--page", type=Path, default=_ROOT / "docs" / "reliability.md", help="the page to write")
    parser.add_argument("--fresh", action="store_true", help="remove earlier measurements")
    chosen = parser.parse_args()
    kept = figures.folder()
    if chosen.fresh:
        for file in kept.glob("*.json"):
            file.unlink()
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
    except BrokenPromise as error:
        print(f"broken: {error}")
        return 1
    finally:
        before = chosen.page.read_text(encoding="utf-8") if chosen.page.exists() else ""
        chosen.page.write_text(reliability.page(kept, before), encoding="utf-8")
    return 0


@contextmanager
def _workspace() -> Iterator[Workspace]:
    """Make a workspace, in memory if possible: a killed process loses nothing that it has handed to the system."""
    memory = Path("/dev/shm")
    with _folder(memory if memory.is_dir() else None) as root:
        workspace = Workspace.make(root / "workspace")
        forking.load()
        yield workspace


@contextmanager
def _folder(where: Path | None = None) -> Iterator[Path]:
    """Make a folder, which is kept when a promise was broken."""
    root = Path(tempfile.mkdtemp(prefix="kolotune-faults-", dir=where))
    try:
        yield root
    except BrokenPromise:
        print(f"kept: {root}")
        raise
    else:
        shutil.rmtree(root)


def _kills(file: Path, count: int) -> None:
    tally = Tally.read(file)

    def keep(tally: Tally) -> None:
        tally.write(file)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {tally.kills} kills, {tally.runs} runs finished", flush=True)

    with _workspace() as workspace:
        campaign(workspace, tally, count, keep)


def _container(file: Path, count: int) -> None:
    if reason := docker_engine.skip_reason():
        print(f"no container: {reason}")
        return
    tally = containers.ClientTally.read(file)

    def keep(tally: containers.ClientTally) -> None:
        tally.write(file)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        print(f"{now} {tally.kills} kills, {tally.runs} runs finished, {tally.longest:.1f} s at most", flush=True)

    with tempfile.TemporaryDirectory(prefix="kolotune-faults-") as folder, docker_engine.engine() as client:
        docker_engine.build(client)
        containers.campaign(client, Workspace.make(Path(folder, "workspace"), reference=False), tally, count, keep)


def _calls(file: Path, names: list[str], every: int) -> None:
    results = figures.read(file)
    with _workspace() as workspace:
        for name in names:
            points, killed = stages.kill_at_each_call(workspace, name, every)
            results[name] = {"points": points, "killed": killed, "every": every}
            figures.write(file, results)
            print(f"{name}: {points} calls, killed at {killed}", flush=True)


def _loop(kept: Path, name: str, times: int) -> None:
    file = kept / f"loop-{name}.json"

    def keep(tally: loop.LoopTally) -> None:
        tally.write(file)
        print(f"{name}: {tally.times} runs finished, {tally.kills} kills", flush=True)

    with _folder() as root:
        loop.finish_runs(loop.SUBJECTS[name](root), root, loop.LoopTally.read(file), times, keep)


if __name__ == "__main__":
    sys.exit(main())
