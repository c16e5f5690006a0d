"""The error-compensated quantization of a run: what it is calibrated with, and whether its model can be compensated."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError, ToolchainError
from kolotune.foundation.files import remove
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.stage import Context
from kolotune.runners import child_process, local

from .calibration import compensation_rows
from .compensation import CompensationJob
from .conversion_plan import TensorPlan

_VERSION = 4  # raised when the same calibration gives other blocks


@dataclass(frozen=True)
class Compensation:
    """How the files of a run are compensated.

    Attributes:
        config: folder with the model's config.json.
        rows: calibration tokens.
        tensors: how each tensor of the GGUF is made from the model's.
        journal: the file that keeps finished matrices until all are written; None: nothing is kept.
    """

    config: Path
    rows: list[list[int]]
    tensors: Sequence[TensorPlan]
    journal: Path | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of all that the blocks depend on beside the unquantized GGUF."""
        return hashlib.sha256(json.dumps([_VERSION, self.rows]).encode()).hexdigest()

    def apply(self, source: Path, target: Path, log: Path, reporter: Reporter) -> None:
        """Fill the blocks of a quantized GGUF again, in place.

        Args:
            source: the unquantized GGUF.
            target: the quantized one.
            log: receives the output of the process.
            reporter: shows progress.

        Raises:
            ToolchainError: the model can't be computed layer by layer, or the process failed.
            ArtifactError: a file is damaged.
        """
        with reporter.progress("compensating rounding errors") as progress:

            def on_event(event: str, fields: JsonObject) -> None:
                if event == "layer":
                    done, total = (typed_storage.convert(int, fields[name]) for name in ("done", "of"))
                    progress.update(done, total)

            _run(self._job(source, target), log, on_event)
        if self.journal is not None:
            remove(self.journal)

    def check(self, log: Path) -> None:
        """Check without weights that the model can be computed layer by layer.

        Raises:
            ToolchainError: it can't.
        """
        _run(self._job(Path(), Path()), log, None, "--check")

    def _job(self, source: Path, target: Path) -> CompensationJob:
        key = "" if self.journal is None else f"{hash_file(source)}{self.digest}"
        journal = str(self.journal or "")
        return CompensationJob(str(source), str(target), str(self.config), self.rows, list(self.tensors), journal, key)


def run_compensation(context: Context, tensors: Sequence[TensorPlan]) -> Compensation | None:
    """Return how the quantizations of a run are compensated; None where they are not (`--quantizer ggml`).

    Args:
        context: of the run, whose chats are prepared.
        tensors: how each tensor of its GGUF is made.

    Raises:
        ArtifactError: the prepared chats are missing.
    """
    if context.config.quantizer != "compensated":
        return None
    rows = compensation_rows(context.run.prepared, context.run.tokenizer)
    return Compensation(context.base, rows, tensors, context.run.compensated_blocks)


def check_possible(context: Context, tensors: Sequence[TensorPlan], log: Path) -> None:
    """Check before training that the quantizations of a run can be compensated, where they are to be.

    Raises:
        ConfigError: what is exported was trained elsewhere.
        ToolchainError: the model is of a kind whose layers can't be computed one by one.
    """
    if context.config.quantizer != "compensated":
        return
    if context.source is not None:
        raise ConfigError(
            "--quantizer compensated reads the training chats, and this model was trained elsewhere",
            "Use `--quantizer ggml`.",
        )
    if not tensors:
        raise ToolchainError("--quantizer compensated needs a conversion plan", "Use `--quantizer ggml`.")
    Compensation(context.base, [], tensors).check(log)


def _run(job: CompensationJob, log: Path, on_event: child_process.EventHandler | None, *options: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        typed_storage.write(file, job)
        module = "kolotune.gguf.compensation"
        code = child_process.run(module, str(file), *options, log=log, otherwise=ToolchainError, on_event=on_event)
    if code != 0:
        raise ToolchainError(f"compensating failed: {local.last_lines(log)}", f"The log is {log}.")
