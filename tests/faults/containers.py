"""Clients of the container, killed at random moments while a verb runs in it: nothing may stay behind in there."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

from support import figures
from support.docker_engine import Client
from support.runs import STAGES_WITHOUT_COMPARE, results

from faults.room import Broken, Room, said

NAME = "kolo_faults"
_GONE_SECONDS = 60.0
_QUIET_SECONDS = 1.5
"""Nothing may be seen for so long before it counts as gone: Docker may have been about to start it."""
_LONGEST = 0.6
"""A kill comes before so much of a verb's time has gone: most clients are killed, few are faster."""
_MOST_KILLS = 12
"""Of one run; then it may finish."""
_OTHERS = {
    "check": ["check", "{root}/chats.jsonl", "--base-model={root}/base"],
    "plan": ["plan", "{root}/chats.jsonl", "--base-model={root}/base", "--epochs=3"],
    "chat": ["chat", "{root}/undisturbed", "--prompt=hi", "--max-tokens=500"],
}


@dataclass
class Tally:
    """What a campaign has seen so far.

    Attributes:
        kills: clients killed by SIGKILL while something of kolotune ran in the container.
        early: clients killed while nothing ran there, between two of their questions; they are no kills of that count.
        by_verb: kills by the verb that ran inside.
        by_stage: kills of runs, by the last stage that was begun.
        orphans: kills after which something went on for longer than a minute.
        longest, total: seconds until the last process was gone, at most and in sum.
        runs: folders that were brought to their end, each with the results of the undisturbed run.
        broken: promises that were not kept.
    """

    kills: int = 0
    early: int = 0
    by_verb: dict[str, int] = field(default_factory=dict)
    by_stage: dict[str, int] = field(default_factory=dict)
    orphans: int = 0
    longest: float = 0.0
    total: float = 0.0
    runs: int = 0
    broken: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Tally:
        return cls(**figures.read(file))

    def write(self, file: Path) -> None:
        figures.write(file, dataclasses.asdict(self))


def campaign(client: Client, room: Room, tally: Tally, kills: int, keep: Callable[[Tally], None]) -> None:
    """Kills until the tally has so many; runs are started again each time until they are through, others are not.

    Args:
        client: of an engine with the image.
        room: base and chats.
        tally: is counted up.
        kills: how many there shall be in the tally.
        keep: called with the tally after each kill.

    Raises:
        Broken: a promise was not kept.
    """
    client.bring_up(NAME)
    try:
        _Campaign(client, room, tally, keep).until(kills)
    except Broken as error:
        tally.broken.append(str(error))
        keep(tally)
        raise
    finally:
        client.forget(NAME)


class _Campaign:
    def __init__(self, client: Client, room: Room, tally: Tally, keep: Callable[[Tally], None]) -> None:
        self.client, self.room, self.tally, self.keep = client, room, tally, keep
        self.dice = random.Random(tally.kills)  # a continued campaign throws other ones
        self.seconds: dict[str, float] = {}

    def until(self, kills: int) -> None:
        self.room.expected = self._undisturbed()
        while self.tally.kills < kills:
            folder = self.room.root / f"killed-{self.tally.runs}"
            self._one_folder(folder, kills)
            shutil.rmtree(folder, ignore_errors=True)

    def _undisturbed(self) -> dict[str, str]:
        """Does each verb once; learns what a run makes and how long they take."""
        folder = self.room.root / "undisturbed"
        once = [("run", self._run(self.room.root / "first"))]  # makes what the container keeps for later
        once += [("run", self._run(folder)), *((name, self._other(name)) for name in _OTHERS)]
        for verb, argv in once:
            began = time.monotonic()
            code, output = self.client(*argv, cwd=self.room.root)
            assert code == 0, output
            self.seconds[verb] = time.monotonic() - began
        return results(folder)

    def _run(self, folder: Path) -> list[str]:
        return [*self.room.command(folder, compares=False), f"--container={NAME}"]

    def _other(self, verb: str) -> list[str]:
        return [*(each.format(root=self.room.root) for each in _OTHERS[verb]), f"--container={NAME}"]

    def _one_folder(self, folder: Path, kills: int) -> None:
        """Starts a run again and again, and another verb now and then, until the run is through."""
        done: set[str] = set()
        here = 0
        while True:
            if self.dice.random() < 0.4:
                verb = self.dice.choice(list(_OTHERS))
                self._killed(verb, self._other(verb))
            ends = here >= _MOST_KILLS or self.tally.kills >= kills
            if ends:
                code, output = self.client(*self._run(folder), cwd=self.room.root)
            else:
                code, output = self._killed("run", self._run(folder))
            began, said_done = said(output)
            if began & done:
                raise Broken(f"{', '.join(began & done)} ran again, and was done")
            done |= said_done
            here += 1
            if code == 0:
                break
            if ends:
                raise Broken(f"a run that nobody killed ended with code {code}: {output[-1000:]}")
        if results(folder) != self.room.expected:
            raise Broken("the finished run is not the undisturbed one")
        self.tally.runs += 1
        self.keep(self.tally)

    def _killed(self, verb: str, argv: list[str]) -> tuple[int, str]:
        """Kills a client at a random moment; returns its exit code, which is another if it was faster, and output."""
        child = self.client.start(*argv, cwd=self.room.root)
        at_work = self._wait(child, self.dice.uniform(0.0, self.seconds[verb] * _LONGEST))
        child.kill()
        output = child.communicate()[0]
        killed = time.monotonic()
        if child.returncode >= 0:
            if child.returncode != 0:
                raise Broken(f"{verb} ended by itself with code {child.returncode}: {output[-1000:]}")
            return 0, output
        gone = self._gone_after(killed)
        self.tally.longest = max(self.tally.longest, gone)
        if not at_work:
            self.tally.early += 1
            return child.returncode, output
        self.tally.kills += 1
        self.tally.by_verb = dict(Counter(self.tally.by_verb) + Counter([verb]))
        if verb == "run":
            begun = ["before the first stage", *(line[4:].partition(":")[0] for line in _begun(output))]
            self.tally.by_stage = dict(Counter(self.tally.by_stage) + Counter([begun[-1]]))
        self.tally.total += gone
        self.keep(self.tally)
        return child.returncode, output

    def _wait(self, child: Popen[str], seconds: float) -> bool:
        """Waits so long, less if the client ends; says whether something runs inside then."""
        until = time.monotonic() + seconds
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return bool(self.client.processes(NAME))

    def _gone_after(self, killed: float) -> float:
        """Seconds from the kill until nothing of kolotune was seen any more.

        Raises:
            Broken: something is left behind.
        """
        seen = killed
        while time.monotonic() - seen < _QUIET_SECONDS:
            if left := self.client.processes(NAME):
                seen = time.monotonic()
                if seen - killed > _GONE_SECONDS:
                    self.tally.orphans += 1
                    raise Broken(f"left behind in the container: {'; '.join(left)}")
            time.sleep(0.05)
        return seen - killed


def _begun(output: str) -> list[str]:
    return [
        line
        for line in output.splitlines()
        if line.startswith("... ") and line[4:].partition(":")[0] in STAGES_WITHOUT_COMPARE
    ]
