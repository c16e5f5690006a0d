"""The lines of metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.foundation.errors import ArtifactError
from kolotune.run_folder.metrics import (
    MetricsLine,
    answer_losses,
    held_out_accuracies,
    held_out_losses,
    kept_held_out_loss,
    read_metrics,
)


def test_steps_and_evaluations_are_distinguished(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 0, "held_out_loss": 3.5}\n\n{"step": 1, "epoch": 0.5, "loss": 2, "time": 7.5}\n')
    lines = read_metrics(file)
    assert lines == [MetricsLine(0, held_out_loss=3.5), MetricsLine(1, loss=2.0, time=7.5)]
    assert held_out_losses(lines) == [(0, 3.5)]


def test_a_damaged_line_is_an_error_with_its_number_or_skipped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    with pytest.raises(ArtifactError, match=r"metrics\.jsonl:2: "):
        read_metrics(file)
    assert read_metrics(file, skip_damaged=True) == [MetricsLine(1, loss=2.5)]
    with pytest.raises(ArtifactError):
        read_metrics(tmp_path / "none.jsonl")


def test_the_kept_loss_is_the_last_or_the_best() -> None:
    losses = [(0, 3.0), (5, 1.0), (10, 2.0)]
    lines = [MetricsLine(7, loss=0.1), *(MetricsLine(step, held_out_loss=loss) for step, loss in losses)]
    assert kept_held_out_loss(lines, early_stopping=False) == 2.0
    assert kept_held_out_loss(lines, early_stopping=True) == 1.0
    preferences = [MetricsLine(0, held_out_loss=0.6, held_out_accuracy=0.9)]
    preferences += [MetricsLine(5, held_out_loss=0.4, held_out_accuracy=0.8)]
    assert kept_held_out_loss(preferences, early_stopping=True) == 0.6, "accuracy decides"


def test_answer_losses_are_those_of_the_base_and_of_what_was_kept() -> None:
    lines = [
        MetricsLine(0, held_out_loss=0.7, held_out_accuracy=0.0, held_out_answer_loss=3.0),
        MetricsLine(5, held_out_loss=0.6, held_out_accuracy=0.9, held_out_answer_loss=4.0),
        MetricsLine(10, held_out_loss=0.4, held_out_accuracy=0.8, held_out_answer_loss=5.0),
        MetricsLine(11, loss=0.1),
    ]
    assert answer_losses(lines, early_stopping=False) == (3.0, 5.0)
    assert answer_losses(lines, early_stopping=True) == (3.0, 4.0), "accuracy decides"
    assert held_out_accuracies(lines) == [(0, 0.0), (5, 0.9), (10, 0.8)]
    supervised = [MetricsLine(0, held_out_loss=3.0), MetricsLine(5, held_out_loss=1.0), MetricsLine(9, held_out_loss=2)]
    assert answer_losses(supervised, early_stopping=False) == (3.0, 2.0)
    assert answer_losses(supervised, early_stopping=True) == (3.0, 1.0)
    assert answer_losses(supervised[1:], early_stopping=True) is None and answer_losses([], early_stopping=True) is None
