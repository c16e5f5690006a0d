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
        held_out_loss: mean loss of the held-out tokens, in nats; of a preference objective, its mean loss.
        accuracy, margin: of a preference objective, in the step: the share of answers on the right side, and by how
            much the rewards of preferred answers are ahead of those of rejected ones.
        held_out_accuracy: the same share of the held-out answers.
        held_out_answer_loss: of a preference objective, the mean loss of the preferred held-out answers' tokens, in
            nats.
        time: seconds since 1970.
    """

    step: int
    loss: float | None = None
    learning_rate: float = 0.0
    tokens_per_second: float = 0.0
    memory_mb: float = 0.0
    held_out_loss: float | None = None
    accuracy: float | None = None
    margin: float | None = None
    held_out_accuracy: float | None = None
    held_out_answer_loss: float | None = None
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


def held_out_accuracies(lines: Iterable[MetricsLine]) -> list[tuple[int, float]]:
    """Return (step, held-out accuracy) of each evaluation of a preference objective."""
    return [(line.step, line.held_out_accuracy) for line in lines if line.held_out_accuracy is not None]


def answer_losses(lines: Iterable[MetricsLine], *, early_stopping: bool) -> tuple[float, float] | None:
    """Return the mean held-out loss per token of trained answers, before the training and of the adapter that was kept.

    Returns:
        None where nothing was held out, or the first evaluation is missing.
    """
    evaluations = [line for line in lines if line.held_out_loss is not None]
    if not evaluations or evaluations[0].step != 0:
        return None
    kept = max(evaluations, key=_quality) if early_stopping else evaluations[-1]
    before, after = (
        line.held_out_loss if line.held_out_accuracy is None else line.held_out_answer_loss
        for line in (evaluations[0], kept)
    )
    return None if before is None or after is None else (before, after)


def _quality(line: MetricsLine) -> tuple[float, float]:
    """How good an evaluation is: by its accuracy, and among equals by its loss."""
    assert line.held_out_loss is not None
    return line.held_out_accuracy or 0.0, -line.held_out_loss


def kept_held_out_loss(lines: Iterable[MetricsLine], *, early_stopping: bool) -> float:
    """Return the held-out loss of the adapter that was kept: the last one, or the best with early stopping.

    The best is the one with the lowest loss; of a preference objective, with the highest accuracy.
    """
    evaluations = [line for line in lines if line.held_out_loss is not None]
    loss = (max(evaluations, key=_quality) if early_stopping else evaluations[-1]).held_out_loss
    assert loss is not None
    return loss
