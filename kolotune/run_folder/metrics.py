"""`metrics.jsonl`: a line for each step and each evaluation of a training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError


@dataclass(frozen=True)
class MetricsLine:
    """One line: a step, which has a `loss`, or an evaluation, which has a `held_out_loss`.

    Attributes:
        step: optimizer steps done, from 1; 0 for an evaluation before the first.
        loss: mean loss of the step's trained tokens, in nats.
        learning_rate: of the step.
        tokens_per_second: speed of the step; see `engines.events.StepDone`.
        memory_mb: peak memory so far, in MB.
        held_out_loss: mean loss of the held-out tokens, in nats.
        time: seconds since 1970.
    """

    step: int
    loss: float | None = None
    learning_rate: float = 0.0
    tokens_per_second: float = 0.0
    memory_mb: float = 0.0
    held_out_loss: float | None = None
    time: float | None = None


def parse_line(text: str) -> MetricsLine | None:
    """Parse a line; None when it is damaged, as a crash in the middle of writing leaves it."""
    try:
        return typed_storage.parse(MetricsLine, text)
    except typed_storage.StorageError:
        return None


def read_metrics(path: Path, *, skip_damaged: bool = False) -> list[MetricsLine]:
    """Read a metrics file.

    Args:
        path: the file.
        skip_damaged: skip damaged lines.

    Raises:
        ArtifactError: the file can't be read, or a line is damaged.
    """
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror or error}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        line = parse_line(text)
        if line is not None:
            lines.append(line)
        elif not skip_damaged:
            raise ArtifactError(f"{path}:{number}: can't be read: the line is damaged")
    return lines


def held_out_losses(lines: Iterable[MetricsLine]) -> list[tuple[int, float]]:
    """Return (step, held-out loss) of each evaluation."""
    return [(line.step, line.held_out_loss) for line in lines if line.held_out_loss is not None]


def kept_held_out_loss(losses: Iterable[tuple[int, float]], *, early_stopping: bool) -> float:
    """Return the held-out loss of the adapter that was kept: the last one, or the best with early stopping."""
    values = [loss for _, loss in losses]
    return min(values) if early_stopping else values[-1]
