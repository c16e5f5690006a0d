"""`kolotune run`, killed at a random moment and started again until it finishes: ordinary processes, in real time."""

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

from faults.room import Broken
from kolotune.foundation.reporter import PlainReporter

_SAMPLE = Path(__file__).resolve().parents[2] / "examples" / "lighthouse"
_LONGEST = 0.6
"""A kill comes before so much of an undisturbed run's time has gone: most runs are killed several times."""
_TINY_CHATS = 24


@dataclass(frozen=True)
class Subject:
    """What is run: the arguments behind `kolotune run`, and every how many steps it writes a checkpoint."""

    name: str
    arguments: tuple[str, ...]
    interval: int


@dataclass
class Loops:
    """What was seen of one subject, kept in a file.

    Attributes:
        times: runs that were brought to their end.
        kills: in all of them; `most_kills` in one.
        steps: of one undisturbed training; `again` were computed a second time, in all runs.
        interval: steps between checkpoints: no more than so many may be computed again for a kill.
        seconds: of the undisturbed run; `longest` of all attempts at one run together.
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
    def read(cls, file: Path) -> Loops:
        return cls(**figures.read(file))

    def write(self, file: Path) -> None:
        figures.write(file, asdict(self))


def tiny(root: Path) -> Subject:
    """A random Llama of two layers and chats for it, made in `root`; every stage, the comparison too."""
    tiny_model(root / "base", PlainReporter())
    (root / "chats.jsonl").write_text("".join(map(chat_line, range(_TINY_CHATS))), encoding="utf-8")
    arguments = (
        str(root / "chats.jsonl"), f"--base-model={root / 'base'}", "--epochs=3", "--lora-rank=2", "--batch-size=2",
        "--checkpoint-steps=4", "--compare-chats=1", "--compare-answers=0",
    )  # fmt: skip
    return Subject("tiny", arguments, 4)


def sample(_: Path) -> Subject:
    """The sample that `make demo` runs, on the real model."""
    return Subject("sample", (f"--config={_SAMPLE / 'kolotune.yaml'}", "--checkpoint-steps=10"), 10)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {"tiny": tiny, "sample": sample}
_ALIKE = ("--dtype=fp32", "--compile=off", "--lora-dropout=0.1", "--template-date=2026-01-02", "--use-checkpoint")


def until_through(subject: Subject, root: Path, seen: Loops, times: int, keep: Callable[[Loops], None]) -> None:
    """Brings so many runs to their end in all, each killed at random moments; every one must be the undisturbed one.

    Args:
        subject: what is run.
        root: an empty folder.
        seen: is counted up.
        times: how many runs there shall be in it.
        keep: called after each run.

    Raises:
        Broken: a promise was not kept; the folder stays as it is.
    """
    began = time.monotonic()
    first = _Attempts(subject, root / "undisturbed")
    if first.go_on(None) != 0:
        raise Broken(f"the undisturbed run failed: {first.output.read_text()[-500:]}")
    seen.seconds, seen.steps, seen.interval = time.monotonic() - began, first.computed, subject.interval
    expected, curve = results(first.folder), losses(first.folder / "metrics.jsonl")
    while seen.times < times:
        dice = random.Random(f"{subject.name} {seen.times}")
        run = _Attempts(subject, root / f"run-{seen.times}")
        began = time.monotonic()
        while run.go_on(dice.uniform(0, seen.seconds * _LONGEST)) != 0:
            pass
        if results(run.folder) != expected or losses(run.folder / "metrics.jsonl") != curve:
            raise Broken(f"{run.folder.name} is not the undisturbed run")
        again = run.computed - first.computed
        if again > subject.interval * run.kills:
            raise Broken(f"{run.folder.name}: {again} steps were computed again after {run.kills} kills")
        seen.times, seen.kills, seen.again = seen.times + 1, seen.kills + run.kills, seen.again + again
        seen.most_kills = max(seen.most_kills, run.kills)
        seen.longest = max(seen.longest, time.monotonic() - began)
        for name, count in run.killed_in.items():
            seen.stages[name] = seen.stages.get(name, 0) + count
        shutil.rmtree(run.folder)
        keep(seen)


class _Attempts:
    """One run, started again and again with the same command.

    Attributes:
        kills: so far.
        computed: training steps that were computed in all attempts together.
        killed_in: kills by the stage that was at work.
    """

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.folder, self.output = folder, folder.with_name(f"{folder.name}.jsonl")
        self._argv = [
            sys.executable, "-m", "kolotune", "run", *subject.arguments, *_ALIKE, f"--output-dir={folder}", "--json",
        ]  # fmt: skip
        self._done: set[str] = set()
        self.kills = self.computed = 0
        self.killed_in: dict[str, int] = {}

    def go_on(self, seconds: float | None) -> int:
        """Starts it, kills it and all it started after so many seconds, and reads what it told.

        Returns:
            0 when it is through.

        Raises:
            Broken: it failed by itself, or did again what was done.
        """
        with self.output.open("wb") as file:
            process = subprocess.Popen(self._argv, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        killed = False
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            killed = code != 0
        events = list(_events(self.output))
        began, self._done = self._require_once(events)
        self.computed += _steps(events)
        if killed:
            self.kills += 1
            stage = began[-1] if began and began[-1] not in self._done else "between stages"
            self.killed_in[stage] = self.killed_in.get(stage, 0) + 1
        elif code != 0:
            raise Broken(f"{self.folder.name} ended with code {code}: {self.output.read_text()[-500:]}")
        return code

    def _require_once(self, events: Sequence[dict[str, Any]]) -> tuple[list[str], set[str]]:
        """The stages that began now, and those done so far."""
        from kolotune.pipeline.stages import STAGE_NAMES

        def stages(kind: str) -> list[str]:
            texts = [event["text"] for event in events if event["event"] == kind]
            found = [match.group(1) for text in texts if (match := re.match(r"(\w+): ", text))]
            return [name for name in found if name in STAGE_NAMES]

        began = stages("doing")
        if again := self._done & set(began):
            raise Broken(f"{self.folder.name}: {', '.join(again)} ran again, and was done")
        return began, self._done | set(stages("success"))


def _events(output: Path) -> list[dict[str, Any]]:
    """What was printed; a line that a kill cut off, and those of libraries, are passed over."""
    found = []
    for line in output.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and "event" in event:
                found.append(event)
    return found


def _steps(events: Sequence[dict[str, Any]]) -> int:
    """Training steps that were computed and told in one attempt."""
    told = [event["done"] for event in events if event["event"] == "progress" and event["title"] == "training"]
    return len(set(told))
