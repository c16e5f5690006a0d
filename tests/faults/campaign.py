"""Random kills over all stages of a tiny run, which is started again each time; it can be continued at any time."""

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
from faults.room import INTERVAL, STEPS, Broken, Room, said
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import read_mark

_MOST_KILLS, _MOST_AT_LAST = 14, 2
"""Of one folder, and of one in which the last stage is all that is left: then it may finish."""
_LAST, _COMPARES = "compare", 5
"""The last stage takes longer than all others: only every fifth run has it."""
_MOST_SECONDS = {"main": 0.5, "child": 0.3}
"""Of processor time, until a kill; a whole run takes its main process several times as long."""
_GONE_SECONDS = 60.0


@dataclass
class Tally:
    """What a campaign has seen so far, kept in a file.

    Attributes:
        kills: processes killed while they worked: whole groups, main processes alone, or what they had started.
        runs: folders that were brought to their end, each with the results of the undisturbed run.
        by_stage: kills by the stage that was at work.
        steps: training steps computed in the folders that are finished; undisturbed ones would have been `STEPS` each.
        most_lost: steps computed again, at most, for each kill in training.
        longest: seconds until the last child of a killed main process was gone.
        broken: promises that were not kept.
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


def campaign(room: Room, tally: Tally, kills: int, keep: Callable[[Tally], None], seed: int | None = None) -> None:
    """Kills until the tally has so many, one folder after the other; the last one is brought to its end.

    Args:
        room: where.
        tally: is counted up.
        kills: how many there shall be in the tally.
        keep: called with the tally after each folder.
        seed: of the dice; default: the number of kills so far, so that a continued campaign throws other ones.

    Raises:
        Broken: a promise was not kept; the folder stays as it is.
    """
    dice = random.Random(tally.kills if seed is None else seed)
    while tally.kills < kills:
        folder = room.root / f"killed-{tally.kills}"
        for old in (room.output(folder), room.steps_file(folder)):
            old.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            stages = STAGE_NAMES if tally.runs % _COMPARES == 0 else STAGES_WITHOUT_COMPARE
            _one_folder(room, folder, tally, dice, min(_MOST_KILLS, kills - tally.kills), stages)
        except Broken as error:
            tally.broken.append(f"{folder.name}: {error}")
            keep(tally)
            raise
        shutil.rmtree(folder)
        keep(tally)


def _one_folder(room: Room, folder: Path, tally: Tally, dice: random.Random, most: int, stages: Sequence[str]) -> None:
    """Runs, kills at most so often, and checks, until a run is through."""
    done: set[str] = set()
    here: Counter[str] = Counter()
    while True:
        printed = room.output(folder).stat().st_size if room.output(folder).is_file() else 0
        left = [name for name in stages if name not in done]
        may_finish = here.total() >= most or not left or (left == [_LAST] and here[_LAST] >= _MOST_AT_LAST)
        kind = "none" if may_finish else dice.choice(("group", "group", "main", "main", "main", "child"))
        after = dice.uniform(0.001, _MOST_SECONDS["child" if kind == "child" else "main"])
        child = room.start(folder, _dies(kind, after), compares=_LAST in stages)
        code = child.wait()
        at_work = _at_work(folder)
        if kind == "group":
            for each in forking.family(child.pid):
                each.kill()
        text = room.output(folder).read_bytes()[printed:].decode(errors="replace")
        began, said_done = said(text)
        if began & done:
            raise Broken(f"{', '.join(began & done)} ran again, and was done")
        done = room.require_good(folder, done)
        if not said_done <= done:
            raise Broken(f"{', '.join(said_done - done)} was told to be done, and is not")
        if code == 0:
            break
        _count_kill(child, kind, text, tally, dice)
        here[at_work] += 1
    room.require_finished(folder, stages)
    steps = room.steps(folder)
    lost = steps - STEPS
    if lost > INTERVAL * here.total():
        raise Broken(f"{lost} steps were computed again after {here.total()} kills")
    tally.runs, tally.steps = tally.runs + 1, tally.steps + steps
    tally.most_lost = max(tally.most_lost, lost / max(1, here["train"]))
    tally.by_stage = dict(Counter(tally.by_stage) + here)


def _dies(kind: str, after: float) -> Callable[[], None]:
    def prelude() -> None:
        if kind != "none":
            forking.die_after(after, children=kind == "child")

    return prelude


def _at_work(folder: Path) -> str:
    """The stage that was not brought to its end, or what stands between them."""
    marked = [name for name in STAGE_NAMES if read_mark(RunFolder(folder), name)]
    return marked[-1] if marked else "between stages"


def _count_kill(child: forking.Fork, kind: str, text: str, tally: Tally, dice: random.Random) -> None:
    """Counts it, if the run did not fail by itself; half of the time waits for what a killed main process had started.

    Otherwise the next run begins at once, as an impatient user's would.
    """
    by_child = kind == "child" and "error: " in text and "Traceback" not in text
    if child.returncode != forking.ENDED_BY_TIMER and not by_child:
        raise Broken(f"the run ended with code {child.returncode}: {text[-500:]}")
    tally.kills += 1
    tally.groups += kind == "group"
    tally.alone += kind == "main"
    tally.children += kind == "child"
    if dice.random() < 0.5:
        return
    began = time.monotonic()
    while forking.family(child.pid):
        if time.monotonic() - began > _GONE_SECONDS:
            raise Broken("a child of a killed process goes on")
        time.sleep(0.01)
    tally.longest = max(tally.longest, time.monotonic() - began)
