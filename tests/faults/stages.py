"""Kill each stage of a tiny run, or its children, at each system call that changes the run folder."""

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
from faults.workspace import BrokenPromise, Workspace
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.records import read_record

NAMES = [*STAGE_NAMES, "the run's end"]
"""The stages, and what follows them: manifest and report."""


def kill_at_each_call(workspace: Workspace, name: str, every: int = 1) -> tuple[int, int]:
    """Kill at each call of one stage while all others are done; the next run must finish it.

    Args:
        workspace: base model, chats and the undisturbed run.
        name: one of `NAMES`.
        every: take only every Nth call.

    Returns:
        The number of calls, and of those at which a process was killed.

    Raises:
        BrokenPromise: a promise was broken.
    """
    folder = workspace.root / "traced"
    done = set(NAMES[: NAMES.index(name)])  # the stages after it depend on it
    running: list[forking.Fork] = []
    compares = name in NAMES[-2:]  # metrics differ between runs, and the comparison takes longer than the rest
    stages = STAGE_NAMES if compares else STAGES_WITHOUT_COMPARE

    def start() -> int:
        waits = partial(_wait_to_be_traced, reports=name == NAMES[-1])
        running.append(workspace.start(folder, prelude=waits, compares=compares))
        return running[-1].pid

    def wait(pid: int) -> None:
        log = calls.log_of(folder)
        while running[-1].poll() is None:
            if calls.was_killed(log):  # possibly a child: the other processes would continue
                with contextlib.suppress(ProcessLookupError):
                    running[-1].kill()
            time.sleep(0.005)
        for process in forking.family(pid):
            process.kill()

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(workspace.root / "undisturbed", folder)
        _undo(RunFolder(folder), name)

    def check(point: Point) -> None:
        try:
            workspace.require_good(folder, done)
            code = workspace.start(folder, partial(_without_report, name == NAMES[-1]), compares).wait()
            if code != 0:
                raise BrokenPromise(
                    f"the next run ended with code {code}: {workspace.output(folder).read_text()[-500:]}"
                )
            workspace.require_finished(folder, stages)
        except BrokenPromise as error:
            raise BrokenPromise(f"{name}, killed at {point.call} {point.count} of {point.path}: {error}") from error

    def choose(points: Sequence[Point]) -> Sequence[Point]:
        print(f"{name}: {len(points[::every])} calls", flush=True)
        return points[::every]

    return calls.kill_at_each_call(folder, start, wait, prepare, check, choose)


def _undo(run: RunFolder, name: str) -> None:
    """Remove the outputs and the record of a stage."""
    if name == NAMES[-1]:
        run.manifest.unlink()
        run.report.unlink()
        return
    record = read_record(run, name)
    assert record is not None
    for name_of_output in record.outputs:
        path = run.root / name_of_output
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.record(name).unlink()
    if name == "train":
        shutil.rmtree(run.checkpoints)
        run.metrics.unlink()


def _wait_to_be_traced(reports: bool) -> None:
    from kolotune.runners import memory_kills

    _without_report(reports)
    # Here a killed engine does not mean that memory ran out.
    memory_kills._KILLED = ()  # type: ignore[assignment]
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.002)


def _without_report(reports: bool) -> None:
    """Skip the report, unless it is the subject: drawing takes longer than any stage."""
    from kolotune.cli import run as verb

    if not reports:
        verb.reporting = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, attr-defined]
