"""Losses, learning rates and speeds of a training, from its metrics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.run_folder.metrics import held_out_accuracies, held_out_losses, read_metrics

_SMOOTHING = 25  # the moving mean covers at most this fraction of the steps
_MOST_POINTS = 3000  # more steps are thinned out


@dataclass(frozen=True)
class TrainingCurve:
    """The training, step by step.

    Attributes:
        steps, losses, rates, speeds: of each step that is shown.
        held_out: (step, loss) of each evaluation.
        memory_mb: the most memory that was measured.
        accuracies: of a preference objective, of each step that is shown; empty otherwise.
        held_out_accuracies: (step, accuracy) of each evaluation.
    """

    steps: list[int]
    losses: list[float]
    rates: list[float]
    speeds: list[float]
    held_out: list[tuple[int, float]]
    memory_mb: int
    accuracies: list[float] = field(default_factory=list)
    held_out_accuracies: list[tuple[int, float]] = field(default_factory=list)

    def smooth(self) -> list[float]:
        """Return the moving mean of the losses."""
        return _moving_mean(self.losses)

    def smooth_accuracies(self) -> list[float]:
        """Return the moving mean of the accuracies."""
        return _moving_mean(self.accuracies)


def _moving_mean(values: list[float]) -> list[float]:
    window = max(1, len(values) // _SMOOTHING)
    return [
        math.fsum(values[max(0, index + 1 - window) : index + 1]) / min(window, index + 1)
        for index in range(len(values))
    ]


def read_curve(metrics: Path) -> TrainingCurve | None:
    """Return the curve of a training; None if it made no step.

    Raises:
        ArtifactError: the file can't be read.
    """
    lines = read_metrics(metrics)
    steps = [(line, line.loss) for line in lines if line.loss is not None]
    if not steps:
        return None
    shown = steps[:: max(1, len(steps) // _MOST_POINTS)]
    if shown[-1] is not steps[-1]:
        shown.append(steps[-1])
    return TrainingCurve(
        steps=[line.step for line, _ in shown],
        losses=[loss for _, loss in shown],
        rates=[line.learning_rate for line, _ in shown],
        speeds=[line.tokens_per_second for line, _ in shown],
        held_out=held_out_losses(lines),
        memory_mb=int(max(line.memory_mb for line, _ in steps)),
        accuracies=[line.accuracy for line, _ in shown if line.accuracy is not None],
        held_out_accuracies=held_out_accuracies(lines),
    )
