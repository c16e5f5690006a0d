"""A run small enough to be killed a thousand times, and what must be true of its folder at any moment."""

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

# Prefixes of the names that `results` gives to the outputs of each stage.
_OUTPUTS = {
    "prepare": (".kolotune/prepared/",), "train": ("adapter/",), "merge": ("merged_model/",),
    "convert": ("Merged.gguf",), "quantize": ("MergedQ4_K_M.gguf",), "modelfile": ("Modelfile", "ModelfileQ4_K_M"),
    "compare": (),
}  # fmt: skip


class BrokenPromise(AssertionError):
    """A promise of kolotune was broken."""


@dataclass
class Workspace:
    """A base model, chats, and the results of an ordinary, undisturbed run."""

    root: Path
    expected: dict[str, str] = field(default_factory=dict)
    curve: dict[int, float] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, reference: bool = True) -> Workspace:
        """Make base model and chats, and the undisturbed run in an ordinary process."""
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that are started here
        workspace = cls(root)
        tiny_model(root / "base", PlainReporter())
        (root / "chats.jsonl").write_text("".join(map(chat_line, range(CHATS))), encoding="utf-8")
        if reference:
            argv = [sys.executable, "-m", "kolotune", *workspace.command(root / "undisturbed")]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            workspace.expected, workspace.curve = (
                results(root / "undisturbed"),
                losses(root / "undisturbed" / "metrics.jsonl"),
            )
            assert len(workspace.curve) == STEPS
        return workspace

    def command(self, folder: Path, compares: bool = True) -> list[str]:
        """Return the arguments of the run in `folder`, always the same."""
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
        """Return a file next to the folder that gets one byte for each training step of any process."""
        return folder.with_name(f"{folder.name}.steps")

    def start(self, folder: Path, prelude: Callable[[], None] = lambda: None, compares: bool = True) -> forking.Fork:
        """Start the run in `folder` as a fork that calls `prelude` first; its output goes to `output`."""
        steps = self.steps_file(folder)

        def count() -> None:
            prelude()
            from kolotune.engines.native import trainer

            step = trainer.Trainer.step

            def counting(*arguments: object) -> float:
                loss: float = step(*arguments)  # type: ignore[arg-type]
                with steps.open("ab") as file:
                    file.write(b".")
                return loss

            trainer.Trainer.step = counting  # type: ignore[method-assign]

        return forking.kolotune(self.command(folder, compares), self.output(folder), count)

    def output(self, folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.output")

    def steps(self, folder: Path) -> int:
        """Return the number of training steps computed for the folder so far."""
        file = self.steps_file(folder)
        return file.stat().st_size if file.is_file() else 0

    def require_good(self, folder: Path, done_before: set[str]) -> set[str]:
        """Check the contents and records of a folder at any moment; return the stages that are recorded as done.

        Raises:
            BrokenPromise: a file differs from the undisturbed run, or a stage is recorded as done without its outputs,
                or is no longer done.
        """
        actual = results(folder)
        for name, digest in actual.items():
            if self.expected.get(name) != digest:
                raise BrokenPromise(f"{name} differs from the undisturbed run")
        if not (folder / "config.yaml").is_file():
            done: set[str] = set()
        else:
            done = {stage.name for stage in read_status(RunFolder(folder)) if not stage.has_work}
        for stage in done:
            missing = {name for name in self.expected if name.startswith(_OUTPUTS[stage])} - actual.keys()
            if _OUTPUTS[stage] and missing:
                raise BrokenPromise(f"{stage} is recorded as done, but {', '.join(missing)} is missing")
        if not done_before <= done:
            raise BrokenPromise(f"{', '.join(done_before - done)} was done, but no longer is")
        wrong = {step: loss for step, loss in losses(folder / "metrics.jsonl").items() if self.curve[step] != loss}
        if wrong:
            raise BrokenPromise(f"the loss at steps {', '.join(map(str, wrong))} differs")
        return done

    def require_finished(self, folder: Path, stages: Sequence[str] = STAGE_NAMES) -> None:
        """Check that everything, including the loss curve, equals the undisturbed run."""
        self.require_good(folder, set(stages))
        if results(folder) != self.expected or losses(folder / "metrics.jsonl") != self.curve:
            raise BrokenPromise("the finished run differs from the undisturbed one")


def reported_stages(output: str) -> tuple[set[str], set[str]]:
    """Return the stages that a run has reported as started, and as done."""
    started = set(re.findall(r"^\.\.\. (\w+): ", output, re.MULTILINE))
    return started, set(re.findall(r"^ok  (\w+): ", output, re.MULTILINE)) & set(STAGE_NAMES)
