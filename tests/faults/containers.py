"""Clients of the container, killed at random moments while a verb runs in it: no process may be left inside."""

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

from faults.workspace import BrokenPromise, Workspace, reported_stages

NAME = "kolo_faults"
_GONE_SECONDS = 60.0
_QUIET_SECONDS = 1.5
"""So long must no process be seen before all count as ended: Docker may have been about to start one."""
_LONGEST = 0.6
"""A kill comes within this part of a verb's usual time: most clients are killed, few are faster."""
_MOST_KILLS = 12
"""Kills of one run; then it may finish."""
_OTHERS = {
    "check": ["check", "{root}/chats.jsonl", "--base-model={root}/base"],
    "plan": ["plan", "{root}/chats.jsonl", "--base-model={root}/base", "--epochs=3"],
    "chat": ["chat", "{root}/undisturbed", "--prompt=hi", "--max-tokens=500"],
}


@dataclass
class ClientTally:
    """The counts of a campaign so far.

    Attributes:
        kills: clients killed by SIGKILL while something of kolotune ran in the container.
        early: clients killed while nothing ran there; `kills` does not include them.
        by_verb: kills by the verb that ran inside.
        by_stage: kills of runs, by the last stage that had started.
        orphans: kills after which a process ran for longer than a minute.
        longest, total: seconds until the last process had ended, maximum and sum.
        runs: finished folders, each with the results of the undisturbed run.
        broken: broken promises.
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
    def read(cls, file: Path) -> ClientTally:
        return cls(**figures.read(file))

    def write(self, file: Path) -> None:
        figures.write(file, dataclasses.asdict(self))


def campaign(
    client: Client, workspace: Workspace, tally: ClientTally, kills: int, keep: Callable[[ClientTally], None]
) -> None:
    """Kill until the tally is full. Runs are started again until they finish, other verbs are not.

    Args:
        client: of an engine with the image.
        workspace: base model and chats.
        tally: updated.
        kills: the number of kills in the full tally.
        keep: called with the tally after each kill.

    Raises:
        BrokenPromise: a promise was broken.
    """
    client.bring_up(NAME)
    try:
        _ClientCampaign(client, workspace, tally, keep).until(kills)
    except BrokenPromise as error:
        tally.broken.append(str(error))
        keep(tally)
        raise
    finally:
        client.forget(NAME)


class _ClientCampaign:
    def __init__(
        self, client: Client, workspace: Workspace, tally: ClientTally, keep: Callable[[ClientTally], None]
    ) -> None:
        self.client, self.workspace, self.tally, self.keep = client, workspace, tally, keep
        self.dice = random.Random(tally.kills)  # a resumed campaign gets other numbers
        self.seconds: dict[str, float] = {}

    def until(self, kills: int) -> None:
        self.workspace.expected = self._undisturbed()
        while self.tally.kills < kills:
            folder = self.workspace.root / f"killed-{self.tally.runs}"
            self._one_folder(folder, kills)
            shutil.rmtree(folder, ignore_errors=True)

    def _undisturbed(self) -> dict[str, str]:
        """Run each verb once; record its time, and return the results of the run."""
        folder = self.workspace.root / "undisturbed"
        once = [("run", self._run(self.workspace.root / "first"))]  # fills the container's caches
        once += [("run", self._run(folder)), *((name, self._other(name)) for name in _OTHERS)]
        for verb, argv in once:
            started = time.monotonic()
            code, output = self.client(*argv, cwd=self.workspace.root)
            assert code == 0, output
            self.seconds[verb] = time.monotonic() - started
        return results(folder)

    def _run(self, folder: Path) -> list[str]:
        return [*self.workspace.command(folder, compares=False), f"--container={NAME}"]

    def _other(self, verb: str) -> list[str]:
        return [*(word.format(root=self.workspace.root) for word in _OTHERS[verb]), f"--container={NAME}"]

    def _one_folder(self, folder: Path, kills: int) -> None:
        """Start a run repeatedly, and another verb now and then, until the run finishes."""
        done: set[str] = set()
        attempts = 0
        while True:
            if self.dice.random() < 0.4:
                verb = self.dice.choice(list(_OTHERS))
                self._kill_client(verb, self._other(verb))
            is_last = attempts >= _MOST_KILLS or self.tally.kills >= kills
            if is_last:
                code, output = self.client(*self._run(folder), cwd=self.workspace.root)
            else:
                code, output = self._kill_client("run", self._run(folder))
            started, reported_done = reported_stages(output)
            if started & done:
                raise BrokenPromise(f"{', '.join(started & done)} was done, but ran again")
            done |= reported_done
            attempts += 1
            if code == 0:
                break
            if is_last:
                raise BrokenPromise(f"a run that was not killed ended with code {code}: {output[-1000:]}")
        if results(folder) != self.workspace.expected:
            raise BrokenPromise("the finished run differs from the undisturbed one")
        self.tally.runs += 1
        self.keep(self.tally)

    def _kill_client(self, verb: str, argv: list[str]) -> tuple[int, str]:
        """Kill a client at a random moment; return its exit code, which is 0 if it was faster, and its output."""
        child = self.client.start(*argv, cwd=self.workspace.root)
        was_running = self._wait(child, self.dice.uniform(0.0, self.seconds[verb] * _LONGEST))
        child.kill()
        output = child.communicate()[0]
        killed = time.monotonic()
        if child.returncode >= 0:
            if child.returncode != 0:
                raise BrokenPromise(f"{verb} failed with code {child.returncode}: {output[-1000:]}")
            return 0, output
        seconds = self._seconds_until_idle(killed)
        self.tally.longest = max(self.tally.longest, seconds)
        if not was_running:
            self.tally.early += 1
            return child.returncode, output
        self.tally.kills += 1
        self.tally.by_verb = dict(Counter(self.tally.by_verb) + Counter([verb]))
        if verb == "run":
            stages = ["before the first stage", *(line[4:].partition(":")[0] for line in _started_lines(output))]
            self.tally.by_stage = dict(Counter(self.tally.by_stage) + Counter([stages[-1]]))
        self.tally.total += seconds
        self.keep(self.tally)
        return child.returncode, output

    def _wait(self, child: Popen[str], seconds: float) -> bool:
        """Wait until the time is over or the client ends; return whether something runs inside then."""
        until = time.monotonic() + seconds
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        return bool(self.client.processes(NAME))

    def _seconds_until_idle(self, killed: float) -> float:
        """Return the seconds from the kill until no process of kolotune was seen any more.

        Raises:
            BrokenPromise: a process is left behind.
        """
        last_seen = killed
        while time.monotonic() - last_seen < _QUIET_SECONDS:
            if remaining := self.client.processes(NAME):
                last_seen = time.monotonic()
                if last_seen - killed > _GONE_SECONDS:
                    self.tally.orphans += 1
                    raise BrokenPromise(f"left behind in the container: {'; '.join(remaining)}")
            time.sleep(0.05)
        return last_seen - killed


def _started_lines(output: str) -> list[str]:
    return [
        line
        for line in output.splitlines()
        if line.startswith("... ") and line[4:].partition(":")[0] in STAGES_WITHOUT_COMPARE
    ]
