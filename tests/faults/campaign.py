"""Random kills over all stages of a tiny run, which is started again each time. A campaign can be resumed."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support import figures
from support.runs import STAGES_WITHOUT_COMPARE

from faults import forking
from faults.workspace import INTERVAL, STEPS, BrokenPromise, Workspace, reported_stages
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import read_mark

_MOST_KILLS, _MOST_AT_LAST = 14, 2
"""Kills of one folder, and kills when only the last stage is left; then the run may finish."""
_LAST, _COMPARES = "compare", 5
"""The last stage takes longer than all others, so only every fifth run has it."""
_MOST_SECONDS = {"main": 0.5, "child": 0.3}
"""Maximum processor time until a kill; the main process of a whole run takes several times as long."""
_GONE_SECONDS = 60.0


@dataclass
class Tally:
    """The counts of a campaign so far, kept in a file.

    Attributes:
        kills: killed processes: `groups` with all their children, `alone` the main process, `children` only.
        runs: finished folders, each with the results of the undisturbed run.
        by_stage: kills by running stage.
        steps: training steps computed in the finished folders; undisturbed runs have `STEPS` each.
        most_lost: maximum of steps computed again per kill in training.
        longest: seconds until the last child of a killed main process had ended.
        broken: broken promises.
    """

    kills: int = 0
    groups: int = 0
    alone: int = 0
    children: int = 0
    runs: int = 0
    steps: int = 0
    most_lost: float = 0.0
    longest: float = 0.0
    by_stage: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Tally:
        return cls(**figures.read(file))

    def write(self, file: Path) -> None:
        figures.write(file, dataclasses.asdict(self))


def campaign(
    workspace: Workspace, tally: Tally, kills: int, keep: Callable[[Tally], None], seed: int | None = None
) -> None:
    """Kill until the tally is full, one folder after the other; the last one is finished.

    Args:
        workspace: base model and chats.
        tally: updated.
        kills: the number of kills in the full tally.
        keep: called with the tally after each folder.
        seed: of the random numbers; default: the kills so far, so that a resumed campaign gets other ones.

    Raises:
        BrokenPromise: a promise was broken; the folder is kept.
    """
    dice = random.Random(tally.kills if seed is None else seed)
    while tally.kills < kills:
        folder = workspace.root / f"killed-{tally.kills}"
        for old in (workspace.output(folder), workspace.steps_file(folder)):
            old.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            stages = STAGE_NAMES if tally.runs % _COMPARES == 0 else STAGES_WITHOUT_COMPARE
            _one_folder(workspace, folder, tally, dice, min(_MOST_KILLS, kills - tally.kills), stages)
        except BrokenPromise as error:
            tally.broken.append(f"{folder.name}: {error}")
            keep(tally)
            raise
        shutil.rmtree(folder)
        keep(tally)


def _one_folder(
    workspace: Workspace, folder: Path, tally: Tally, dice: random.Random, most: int, stages: Sequence[str]
) -> None:
    """Run, kill at most `most` times, and check, until a run finishes."""
    done: set[str] = set()
    kills: Counter[str] = Counter()
    while True:
        printed = workspace.output(folder).stat().st_size if workspace.output(folder).is_file() else 0
        remaining = [name for name in stages if name not in done]
        may_finish = kills.total() >= most or not remaining or (remaining == [_LAST] and kills[_LAST] >= _MOST_AT_LAST)
        kind = "none" if may_finish else dice.choice(("group", "group", "main", "main", "main", "child"))
        after = dice.uniform(0.001, _MOST_SECONDS["child" if kind == "child" else "main"])
        child = workspace.start(folder, _death(kind, after), compares=_LAST in stages)
        code = child.wait()
        stage = _running_stage(folder)
        if kind == "group":
            for process in forking.family(child.pid):
                process.kill()
        text = workspace.output(folder).read_bytes()[printed:].decode(errors="replace")
        started, reported_done = reported_stages(text)
        if started & done:
            raise BrokenPromise(f"{', '.join(started & done)} was done, but ran again")
        done = workspace.require_good(folder, done)
        if not reported_done <= done:
            raise BrokenPromise(f"{', '.join(reported_done - done)} was reported as done, but is not")
        if code == 0:
            break
        _count_kill(child, kind, text, tally, dice)
        kills[stage] += 1
    workspace.require_finished(folder, stages)
    steps = workspace.steps(folder)
    lost = steps - STEPS
    if lost > INTERVAL * kills.total():
        raise BrokenPromise(f"{lost} steps were computed again after {kills.total()} kills")
    tally.runs, tally.steps = tally.runs + 1, tally.steps + steps
    tally.most_lost = max(tally.most_lost, lost / max(1, kills["train"]))
    tally.by_stage = dict(Counter(tally.by_stage) + kills)


def _death(kind: str, after: float) -> Callable[[], None]:
    def prelude() -> None:
        if kind != "none":
            forking.die_after(after, children=kind == "child")

    return prelude


def _running_stage(folder: Path) -> str:
    """Return the unfinished stage, or "between stages"."""
    marked = [name for name in STAGE_NAMES if read_mark(RunFolder(folder), name)]
    return marked[-1] if marked else "between stages"


def _count_kill(child: forking.Fork, kind: str, text: str, tally: Tally, dice: random.Random) -> None:
    """Count a kill, if the run did not fail otherwise. Half of the time, wait for the children of the killed process.

    Otherwise the next run starts at once, like that of an impatient user.
    """
    by_child = kind == "child" and "error: " in text and "Traceback" not in text
    if child.returncode != forking.ENDED_BY_TIMER and not by_child:
        raise BrokenPromise(f"the run ended with code {child.returncode}: {text[-500:]}")
    tally.kills += 1
    tally.groups += kind == "group"
    tally.alone += kind == "main"
    tally.children += kind == "child"
    if dice.random() < 0.5:
        return
    killed = time.monotonic()
    while forking.family(child.pid):
        if time.monotonic() - killed > _GONE_SECONDS:
            raise BrokenPromise("a child of a killed process keeps running")
        time.sleep(0.01)
    tally.longest = max(tally.longest, time.monotonic() - killed)
