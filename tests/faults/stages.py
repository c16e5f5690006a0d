"""Each stage of a tiny run killed at every system call by which it, or what it starts, changes the run folder."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from support.runs import STAGES_WITHOUT_COMPARE

from faults import calls, forking
from faults.calls import Point
from faults.room import Broken, Room
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record

NAMES = [*STAGE_NAMES, "the run's end"]
"""The stages, and what comes behind them: manifest and report."""


def at_every_call(room: Room, name: str, every: int = 1) -> tuple[int, int]:
    """Kills at each call of one stage, all others being done; the run that follows must finish it.

    Args:
        room: where.
        name: of `NAMES`.
        every: 2 for every second call only, and so on.

    Returns:
        The number of calls, and of those at which a process was killed.

    Raises:
        Broken: a promise was not kept.
    """
    folder = room.root / "traced"
    done = set(NAMES[: NAMES.index(name)])  # those behind it wait for it
    running: list[forking.Fork] = []
    compares = name in NAMES[-2:]  # what training measured is new each time, and comparing takes longer than the rest
    stages = STAGE_NAMES if compares else STAGES_WITHOUT_COMPARE

    def start() -> int:
        waits = partial(_wait_to_be_traced, reports=name == NAMES[-1])
        running.append(room.start(folder, prelude=waits, compares=compares))
        return running[-1].pid

    def wait(pid: int) -> None:
        log = calls.log_of(folder)
        while running[-1].poll() is None:
            if calls.hit(log):  # a child, maybe: what is left would go on
                with contextlib.suppress(ProcessLookupError):
                    running[-1].kill()
            time.sleep(0.005)
        for each in forking.family(pid):
            each.kill()

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(room.root / "undisturbed", folder)
        _undo(RunFolder(folder), name)

    def check(point: Point) -> None:
        try:
            room.require_good(folder, done)
            code = room.start(folder, partial(_without_report, name == NAMES[-1]), compares).wait()
            if code != 0:
                raise Broken(f"the next run ended with code {code}: {room.output(folder).read_text()[-500:]}")
            room.require_finished(folder, stages)
        except Broken as error:
            raise Broken(f"{name}, killed at {point.call} {point.count} of {point.path}: {error}") from error

    def choose(points: Sequence[Point]) -> Sequence[Point]:
        print(f"{name}: {len(points[::every])} calls", flush=True)
        return points[::every]

    return calls.at_every_call(folder, start, wait, prepare, check, choose)


def _undo(run: RunFolder, name: str) -> None:
    """Takes away what the stage made."""
    if name == NAMES[-1]:
        run.manifest.unlink()
        run.report.unlink()
        return
    record = read_record(run, name)
    assert record is not None
    for each in record.outputs:
        path = run.root / each
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.record(name).unlink()
    if name == "train":
        shutil.rmtree(run.checkpoints)
        run.metrics.unlink()


def _wait_to_be_traced(reports: bool) -> None:
    from kolotune.stages import train

    _without_report(reports)
    # A killed engine is what is wanted here, not a lack of memory.
    train._KILLED = ()  # type: ignore[assignment]
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.002)


def _without_report(reports: bool) -> None:
    """Drawing takes longer than any stage, and is a target of its own."""

    from kolotune.cli import run as verb

    if not reports:
        verb.reporting = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, attr-defined]
