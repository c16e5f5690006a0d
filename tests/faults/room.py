"""A run small enough to be killed a thousand times, and what must hold of its folder at any moment."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from support.runs import losses, results
from support.tiny import chat_line, tiny_model

from faults import forking
from kolotune.foundation.reporter import PlainReporter
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.pipeline.status import read_status
from kolotune.run_folder.layout import RunFolder

CHATS, EPOCHS, INTERVAL = 12, 3, 4
STEPS = CHATS // 2 * EPOCHS
"""Steps of an undisturbed training; a checkpoint after every fourth and after each epoch of six."""

# Where the results of each stage begin with, in the names that `results` gives.
_MADE_BY = {
    "prepare": (".kolotune/prepared/",), "train": ("adapter/",), "merge": ("merged_model/",),
    "convert": ("Merged.gguf",), "quantize": ("MergedQ4_K_M.gguf",), "modelfile": ("Modelfile", "ModelfileQ4_K_M"),
    "compare": (),
}  # fmt: skip


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass
class Room:
    """A base, chats, and the results of an ordinary run that nothing disturbed."""

    root: Path
    expected: dict[str, str] = field(default_factory=dict)
    curve: dict[int, float] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, reference: bool = True) -> Room:
        """Makes base and chats, and the undisturbed run, by an ordinary process."""
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started here
        room = cls(root)
        tiny_model(root / "base", PlainReporter())
        (root / "chats.jsonl").write_text("".join(map(chat_line, range(CHATS))), encoding="utf-8")
        if reference:
            argv = [sys.executable, "-m", "kolotune", *room.command(root / "undisturbed")]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            room.expected, room.curve = results(root / "undisturbed"), losses(root / "undisturbed" / "metrics.jsonl")
            assert len(room.curve) == STEPS
        return room

    def command(self, folder: Path, compares: bool = True) -> list[str]:
        """The arguments of the run in `folder`; the same each time."""
        options = {
            "base-model": self.root / "base", "output-dir": folder, "dtype": "fp32", "compile": "off",
            "epochs": EPOCHS, "lora-rank": 2, "lora-dropout": 0.1, "batch-size": 2, "learning-rate": 1e-2,
            "checkpoint-steps": INTERVAL, "eval-split": 0, "template-date": "2026-01-02", "compare-chats": 1,
            "compare-answers": 0,
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in options.items()]
        return [
            "run",
            str(self.root / "chats.jsonl"),
            *flags,
            "--use-checkpoint",
            *([] if compares else ["--no-compare"]),
        ]

    def steps_file(self, folder: Path) -> Path:
        """Beside the folder: one byte for each training step that was computed, by whichever process."""
        return folder.with_name(f"{folder.name}.steps")

    def start(self, folder: Path, prelude: Callable[[], None] = lambda: None, compares: bool = True) -> forking.Fork:
        """The run in `folder`, by a fork that does `prelude` first; its output goes to a file beside the folder."""
        counted = self.steps_file(folder)

        def count() -> None:
            prelude()
            from kolotune.engines.native import training

            step = training.Trainer.step

            def counting(*arguments: object) -> float:
                loss: float = step(*arguments)  # type: ignore[arg-type]
                with counted.open("ab") as file:
                    file.write(b".")
                return loss

            training.Trainer.step = counting  # type: ignore[method-assign]

        return forking.kolotune(self.command(folder, compares), self.output(folder), count)

    def output(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.output")

    def steps(self, folder: Path) -> int:
        """Training steps that were computed for the folder so far."""
        counted = self.steps_file(folder)
        return counted.stat().st_size if counted.is_file() else 0

    def require_good(self, folder: Path, done_before: set[str]) -> set[str]:
        """Checks what a folder holds and claims, at any moment; returns the stages that it claims to be done.

        Raises:
            Broken: something is not what an undisturbed run makes, or is claimed and not there, or was lost.
        """
        found = results(folder)
        for name, digest in found.items():
            if self.expected.get(name) != digest:
                raise Broken(f"{name} is not what an undisturbed run makes")
        if not (folder / "config.yaml").is_file():
            claimed: set[str] = set()
        else:
            claimed = {each.name for each in read_status(RunFolder(folder)) if not each.has_work}
        for stage in claimed:
            missing = {name for name in self.expected if name.startswith(_MADE_BY[stage])} - found.keys()
            if _MADE_BY[stage] and missing:
                raise Broken(f"{stage} is said to be done, and {', '.join(missing)} is not there")
        if not done_before <= claimed:
            raise Broken(f"{', '.join(done_before - claimed)} was done, and no longer is")
        wrong = {step: loss for step, loss in losses(folder / "metrics.jsonl").items() if self.curve[step] != loss}
        if wrong:
            raise Broken(f"the loss at steps {', '.join(map(str, wrong))} is another")
        return claimed

    def require_finished(self, folder: Path, stages: Sequence[str] = STAGE_NAMES) -> None:
        """Checks that all is there and is what an undisturbed run makes, the loss curve included."""
        self.require_good(folder, set(stages))
        if results(folder) != self.expected or losses(folder / "metrics.jsonl") != self.curve:
            raise Broken("the finished run is not the undisturbed one")


def said(output: str) -> tuple[set[str], set[str]]:
    """The stages that a run said it began, and those that it said were done."""
    began = set(re.findall(r"^\.\.\. (\w+): ", output, re.MULTILINE))
    return began, set(re.findall(r"^ok  (\w+): ", output, re.MULTILINE)) & set(STAGE_NAMES)
