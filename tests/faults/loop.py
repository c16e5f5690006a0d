"""`kolotune run`, killed at random moments and started again until it finishes, in ordinary processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support import figures
from support.runs import losses, results
from support.tiny import chat_line, tiny_model

from faults.workspace import BrokenPromise
from kolotune.foundation.reporter import PlainReporter

_SAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lighthouse"
_LONGEST = 0.6
"""A kill comes within this part of an undisturbed run's time: most runs are killed several times."""
_TINY_CHATS = 24


@dataclass(frozen=True)
class Subject:
    """A run: the arguments of `kolotune run`, and its steps between checkpoints."""

    name: str
    arguments: tuple[str, ...]
    interval: int


@dataclass
class LoopTally:
    """The counts of one subject, kept in a file.

    Attributes:
        times: finished runs.
        kills: of all runs; `most_kills` of one.
        steps: of one undisturbed training; `again`: steps of all runs that were computed again.
        interval: steps between checkpoints; at most so many may be computed again per kill.
        seconds: of the undisturbed run; `longest`: of all attempts at one run.
        stages: kills by running stage.
    """

    times: int = 0
    kills: int = 0
    most_kills: int = 0
    steps: int = 0
    again: int = 0
    interval: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    stages: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> LoopTally:
        return cls(**figures.read(file))

    def write(self, file: Path) -> None:
        figures.write(file, asdict(self))


def tiny(root: Path) -> Subject:
    """Make a random Llama of two layers and chats in `root`; the run has every stage."""
    tiny_model(root / "base", PlainReporter())
    (root / "chats.jsonl").write_text("".join(map(chat_line, range(_TINY_CHATS))), encoding="utf-8")
    arguments = (
        str(root / "chats.jsonl"), f"--base-model={root / 'base'}", "--epochs=3", "--lora-rank=2", "--batch-size=2",
        "--checkpoint-steps=4", "--compare-chats=1", "--compare-answers=0",
    )  # fmt: skip
    return Subject("tiny", arguments, 4)


def sample(_: Path) -> Subject:
    """Return the sample that `make demo` runs, with the real model."""
    return Subject("sample", (f"--config={_SAMPLE / 'kolotune.yaml'}", "--checkpoint-steps=10"), 10)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"tiny": tiny, "sample": sample}
_COMMON = ("--dtype=fp32", "--compile=off", "--lora-dropout=0.1", "--template-date=2026-01-02", "--use-checkpoint")


def finish_runs(subject: Subject, root: Path, tally: LoopTally, times: int, keep: Callable[[LoopTally], None]) -> None:
    """Finish runs that are killed at random moments; each must have the results of the undisturbed one.

    Args:
        subject: the run.
        root: an empty folder.
        tally: updated.
        times: the number of runs in the full tally.
        keep: called after each run.

    Raises:
        BrokenPromise: a promise was broken; the folder is kept.
    """
    started = time.monotonic()
    first = _Attempts(subject, root / "undisturbed")
    if first.attempt(None) != 0:
        raise BrokenPromise(f"the undisturbed run failed: {first.output.read_text()[-500:]}")
    tally.seconds, tally.steps, tally.interval = time.monotonic() - started, first.computed, subject.interval
    expected, curve = results(first.folder), losses(first.folder / "metrics.jsonl")
    while tally.times < times:
        dice = random.Random(f"{subject.name} {tally.times}")
        run = _Attempts(subject, root / f"run-{tally.times}")
        started = time.monotonic()
        while run.attempt(dice.uniform(0, tally.seconds * _LONGEST)) != 0:
            pass
        if results(run.folder) != expected or losses(run.folder / "metrics.jsonl") != curve:
            raise BrokenPromise(f"{run.folder.name} differs from the undisturbed run")
        repeated = run.computed - first.computed
        if repeated > subject.interval * run.kills:
            raise BrokenPromise(f"{run.folder.name}: {repeated} steps were computed again after {run.kills} kills")
        tally.times, tally.kills, tally.again = tally.times + 1, tally.kills + run.kills, tally.again + repeated
        tally.most_kills = max(tally.most_kills, run.kills)
        tally.longest = max(tally.longest, time.monotonic() - started)
        for name, count in run.killed_in.items():
            tally.stages[name] = tally.stages.get(name, 0) + count
        shutil.rmtree(run.folder)
        keep(tally)


class _Attempts:
    """One run, started repeatedly with the same command.

    Attributes:
        kills: so far.
        computed: training steps of all attempts.
        killed_in: kills by running stage.
    """

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.folder, self.output = folder, folder.with_name(f"{folder.name}.jsonl")
        self._argv = [
            sys.executable, "-m", "kolotune", "run", *subject.arguments, *_COMMON, f"--output-dir={folder}", "--json",
        ]  # fmt: skip
        self._done: set[str] = set()
        self.kills = self.computed = 0
        self.killed_in: dict[str, int] = {}

    def attempt(self, seconds: float | None) -> int:
        """Start the run, kill it and all its children after some seconds, and read its events.

        Returns:
            0 when the run is finished.

        Raises:
            BrokenPromise: it failed, or a finished stage ran again.
        """
        with self.output.open("wb") as file:
            process = subprocess.Popen(self._argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        is_killed = False
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            is_killed = code != 0
        events = list(_events(self.output))
        started, self._done = self._require_once(events)
        self.computed += _steps(events)
        if is_killed:
            self.kills += 1
            stage = started[-1] if started and started[-1] not in self._done else "between stages"
            self.killed_in[stage] = self.killed_in.get(stage, 0) + 1
        elif code != 0:
            raise BrokenPromise(f"{self.folder.name} ended with code {code}: {self.output.read_text()[-500:]}")
        return code

    def _require_once(self, events: Sequence[dict[str, Any]]) -> tuple[list[str], set[str]]:
        """Return the stages that started in this attempt, and those done so far."""
        from kolotune.pipeline.stages import STAGE_NAMES

        def stages(kind: str) -> list[str]:
            texts = [event["text"] for event in events if event["event"] == kind]
            names = [match.group(1) for text in texts if (match := re.match(r"(\w+): ", text))]
            return [name for name in names if name in STAGE_NAMES]

        started = stages("doing")
        if repeated := self._done & set(started):
            raise BrokenPromise(f"{self.folder.name}: {', '.join(repeated)} was done, but ran again")
        return started, self._done | set(stages("success"))


def _events(output: Path) -> list[dict[str, Any]]:
    """Return the events of an output, without incomplete lines and those of libraries."""
    events = []
    for line in output.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                events.append(event)
    return events


def _steps(events: Sequence[dict[str, Any]]) -> int:
    """Return the number of training steps that one attempt has reported."""
    steps = [event["done"] for event in events if event["event"] == "progress" and event["title"] == "training"]
    return len(set(steps))
