"""Quantize to a budget: measure once how much each matrix loses in each type, choose types, and keep the choice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ConfigError, ToolchainError
from kolotune.foundation.files import remove, replacing
from kolotune.foundation.formatting import format_size
from kolotune.foundation.hashing import Hasher, hash_file
from kolotune.foundation.quantization_budgets import Budget, read_budget
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import HELD_OUT_TOKENS, TRAIN_TOKENS, RunFolder
from kolotune.run_folder.stage import Context
from kolotune.runners import child_process, local

from . import header, quantize
from .calibration import ROW, calibration_rows
from .conversion_plan import TensorPlan
from .header import GgufSummary, HeaderReader
from .quantized_header import quantized_header
from .run_compensation import Compensation
from .sensitivity import SensitivityJob
from .type_choices import Mixture, Sensitivity, curve, knee, read_sensitivity, smallest_size, weight_count

_VERSION = 1  # raised when the same inputs give another measurement
_ROWS = 8  # of the calibration's rows; the first ones are chats, the last ones the text
SENSITIVITY_TOKENS = _ROWS * ROW
"""Tokens that the model reads to measure what types cost."""
_TRIES = 4
_AIM = 0.93  # of the divergence that is allowed: the next measurement may come out a little higher
_NEAR_ENOUGH = 0.8


@dataclass(frozen=True)
class Point:
    """A place on the curve: bytes of the file, and predicted mean KL divergence in nats."""

    size: int
    kl: float


@dataclass(frozen=True)
class ChosenTypes:
    """What a budget became.

    Attributes:
        types: of each tensor that had a choice.
        size: bytes of the file.
        predicted_kl: from the unquantized GGUF, in nats.
        measured_kl: on held-out chats; None where the budget is a size.
    """

    types: dict[str, str]
    size: int
    predicted_kl: float
    measured_kl: float | None = None


@dataclass(frozen=True)
class ChosenMixtures:
    """The budgets of a run, as `RunFolder.tensor_types` has them.

    Attributes:
        curve: what the sizes are predicted to cost, smallest first.
        knee: number of the point behind which more bytes gain little.
        chosen: by the names of the quantizations.
    """

    curve: list[Point] = field(default_factory=list)
    knee: int = 0
    chosen: dict[str, ChosenTypes] = field(default_factory=dict)


@dataclass(frozen=True)
class ChoiceBasis:
    """What types are chosen by.

    Attributes:
        config: folder with the model's config.json.
        rows: calibration tokens.
        tensors: how each tensor of the GGUF is made from the model's.
        tokens: prepared chats on which a divergence is measured.
    """

    config: Path
    rows: list[list[int]]
    tensors: Sequence[TensorPlan]
    tokens: Path

    @property
    def digest(self) -> str:
        """Hash of what the choice depends on beside the unquantized GGUF and the importance matrix."""
        return hashlib.sha256(json.dumps([_VERSION, self.some_rows]).encode()).hexdigest()

    @property
    def some_rows(self) -> list[list[int]]:
        """Return rows at equal distances, so that chats and text have their shares."""
        count = min(_ROWS, len(self.rows))
        return [self.rows[number * len(self.rows) // count] for number in range(count)]


@dataclass
class BudgetQuantizer:
    """Makes the quantizations to a budget of one unquantized GGUF.

    Attributes:
        source: the GGUF.
        sensitivity: the file that keeps what was measured; it is used again where it fits.
        basis: what types are chosen by.
        log: receives the output of processes.
        reporter: shows progress.
        matrix: the importance matrix; None: without one.
        compensation: how rounding errors are compensated; None: they are not.
    """

    source: Path
    sensitivity: Path
    basis: ChoiceBasis
    log: Path
    reporter: Reporter
    matrix: Path | None
    compensation: Compensation | None

    def make(self, name: str, target: Path, hasher: Hasher | None = None) -> ChosenTypes:
        """Make the file of a budget, and return what was chosen.

        Args:
            name: of the quantization, which means a budget.
            target: the GGUF to write.
            hasher: learns the hash of the GGUF.

        Raises:
            ConfigError: the budget is smaller than the smallest file.
            ToolchainError: the model can't be measured, or no choice keeps to the budget.
            ArtifactError: a file is damaged or missing.
        """
        budget = read_budget(name)
        assert budget is not None
        check_budget(name, self._summary, self._header_size)
        size = budget.bytes_of(weight_count(self._summary), self._header_size)
        if size is None:
            return self._make_within_kl(name, target, budget, hasher)
        mixture = self.measured.within_size(size - self._header_size)
        assert mixture is not None  # the smallest one fits
        return self._make(name, mixture, target, hasher)

    @property
    def mixtures(self) -> ChosenMixtures:
        """The curve, without any choice yet."""
        points = curve(self.measured.path, self._header_size)
        return ChosenMixtures([Point(*point) for point in points], knee(points) if points else 0)

    @cached_property
    def measured(self) -> Sensitivity:
        """What each type does to each matrix; measured unless an earlier process did that."""
        key = self.key
        if (known := read_sensitivity(self.sensitivity, self._summary, key)) is not None:
            return known
        with replacing(self.sensitivity) as partial, self.reporter.progress("measuring what each type costs") as shown:

            def on_event(event: str, fields: JsonObject) -> None:
                if event == "layer":
                    done, total = (typed_storage.convert(int, fields[field]) for field in ("done", "of"))
                    shown.update(done, total)

            _run(self._job(partial, key), self.log, on_event)
        measured = read_sensitivity(self.sensitivity, self._summary, key)
        if measured is None:
            raise ArtifactError(f"{self.sensitivity}: is not what was written", "Quantize again.")
        return measured

    def _job(self, target: Path, key: str) -> SensitivityJob:
        basis, matrix = self.basis, str(self.matrix or "")
        return SensitivityJob(
            str(self.source), str(target), str(basis.config), basis.some_rows, list(basis.tensors),
            matrix, self._is_compensated, key,
        )  # fmt: skip

    @cached_property
    def key(self) -> str:
        """Hash of all that the choices depend on."""
        parts = [hash_file(self.source), self.basis.digest, self._is_compensated]
        parts.append(hash_file(self.matrix) if self.matrix else "")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def _is_compensated(self) -> bool:
        return self.compensation is not None

    @cached_property
    def _summary(self) -> GgufSummary:
        return header.read(self.source)

    @cached_property
    def _header_size(self) -> int:
        with self.source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = header.read_whole(data, self.source)
            types = {name: tensor.type for name, tensor in reader.tensors.items()}
            return len(quantized_header(data, reader, types, "Q8_0"))

    def _make(self, name: str, mixture: Mixture, target: Path, hasher: Hasher | None) -> ChosenTypes:
        quantize.quantize_file(
            self.source, target, name, self.log, self.reporter, self.matrix, hasher, self.compensation, mixture.types
        )
        return ChosenTypes(mixture.types, target.stat().st_size, mixture.kl)

    def _make_within_kl(self, name: str, target: Path, budget: Budget, hasher: Hasher | None) -> ChosenTypes:
        """Choose, make and measure; choose again with the factor by which the prediction was wrong."""
        bound = budget.kl
        assert bound is not None
        factor = 1.0
        tried: dict[int, ChosenTypes] = {}
        for _ in range(_TRIES):
            mixture = self.measured.within_kl(_AIM * bound / factor)
            if mixture.size in tried:
                break
            chosen = self._make(name, mixture, target, hasher)
            measured = mean_divergence(self.source, target, self.basis.tokens, self.log)
            self.reporter.note(
                f"{format_size(chosen.size)}: mean KL {measured:.4f} on compared chats, at most {bound:g}"
            )
            tried[mixture.size] = dataclasses.replace(chosen, measured_kl=measured)
            if _NEAR_ENOUGH * bound <= measured <= bound:
                return tried[mixture.size]
            factor = max(measured, 1e-9) / max(mixture.kl, 1e-9)
        good = [chosen for chosen in tried.values() if chosen.measured_kl is not None and chosen.measured_kl <= bound]
        if not good:
            remove(target)
            raise ToolchainError(
                f"{name}: no choice of types was found whose mean KL is at most {bound:g}",
                "Allow more, or name a size such as auto:6bpw.",
            )
        best = min(good, key=lambda chosen: chosen.size)
        if best is not list(tried.values())[-1]:
            self._make(name, Mixture(best.types, 0, best.predicted_kl), target, hasher)
        return best


def choice_basis(context: Context, tensors: Sequence[TensorPlan]) -> ChoiceBasis:
    """Return what types are chosen by in a run.

    Raises:
        ArtifactError: the prepared chats are missing.
    """
    prepared = context.run.prepared
    held_out, train = prepared / HELD_OUT_TOKENS, prepared / TRAIN_TOKENS
    rows = calibration_rows(prepared, context.run.tokenizer)
    return ChoiceBasis(context.base, rows, tensors, held_out if held_out.is_file() else train)


def check_possible(
    context: Context, names: Sequence[str], tensors: Sequence[TensorPlan], content: bytes, log: Path
) -> None:
    """Check before training that a run's quantizations to a budget can be made.

    Args:
        context: of the run.
        names: of quantizations, with or without a budget.
        tensors: how each tensor of the GGUF will be made; [] without a conversion plan.
        content: the header of the GGUF as it is expected.
        log: receives the output of the process.

    Raises:
        ConfigError: what is exported was trained elsewhere, or a budget is smaller than the smallest file.
        ToolchainError: the model is of a kind whose layers can't be computed one by one.
    """
    budgets = [name for name in names if read_budget(name) is not None]
    if not budgets:
        return
    if context.source is not None:
        raise ConfigError(
            f"quantization {budgets[0]}: types are chosen by the training chats, and this model was trained elsewhere",
            "Name a quantization such as Q4_K_M.",
        )
    if not tensors:
        raise ToolchainError(
            f"quantization {budgets[0]} needs a conversion plan", "Name a quantization such as Q4_K_M."
        )
    summary = HeaderReader(content).summary()
    for name in budgets:
        check_budget(name, summary, len(content))
    _run(SensitivityJob("", "", str(context.base), [], list(tensors), "", False, ""), log, None, "--check")


def check_budget(name: str, summary: GgufSummary, header_size: int) -> None:
    """Check that a budget is not smaller than the smallest file of a model.

    Raises:
        ConfigError: it is.
    """
    budget = read_budget(name)
    size = budget.bytes_of(weight_count(summary), header_size) if budget else None
    smallest = smallest_size(summary, header_size)
    if size is not None and size < smallest:
        bits = 8 * (smallest - header_size) / weight_count(summary)
        raise ConfigError(
            f"quantization {name}: is {format_size(size)}, and the smallest file of this model has "
            f"{format_size(smallest)}",
            f"Allow at least auto:{math.ceil(smallest / 1e5) / 10:g}MB or auto:{math.ceil(100 * bits) / 100:g}bpw.",
        )


def mean_divergence(source: Path, target: Path, tokens: Path, log: Path) -> float:
    """Return the mean KL divergence of a GGUF from the unquantized one, in nats, on prepared chats.

    Raises:
        ArtifactError: a file can't be computed.
    """
    measured: list[float] = []
    code = child_process.run(
        "kolotune.gguf.chat_divergence", str(source), str(target), str(tokens), log=log, otherwise=ArtifactError,
        on_event=lambda _, fields: measured.append(typed_storage.convert(float, fields["kl"])),
    )  # fmt: skip
    if code != 0 or not measured:
        raise ArtifactError(f"measuring {target.name} failed: {local.last_lines(log)}", f"The log is {log}.")
    return measured[-1]


def read_mixtures(run: RunFolder) -> ChosenMixtures | None:
    """Return what the budgets of a run became; None where it has none."""
    return typed_storage.read_or_none(ChosenMixtures, run.tensor_types)


def _run(job: SensitivityJob, log: Path, on_event: child_process.EventHandler | None, *options: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.json")
        typed_storage.write(file, job)
        module = "kolotune.gguf.sensitivity"
        code = child_process.run(module, str(file), *options, log=log, otherwise=ToolchainError, on_event=on_event)
    if code != 0:
        raise ToolchainError(f"measuring what each type costs failed: {local.last_lines(log)}", f"The log is {log}.")
