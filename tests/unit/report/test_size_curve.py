"""The curve of sizes: predictions corrected by what was measured, and charts that name the files and the knee."""

from __future__ import annotations

import dataclasses

import pytest

from kolotune.fidelity.comparison import Comparison, QuantizationFigures
from kolotune.gguf.budgets import ChosenMixtures, ChosenTypes, Point
from kolotune.report.charts import size_charts
from kolotune.report.inline_svg import StyleSheet
from kolotune.report.size_curve import size_curve

MIXTURES = ChosenMixtures(
    [Point(80_000_000, 0.4), Point(90_000_000, 0.05), Point(150_000_000, 0.001), Point(270_000_000, 0.0)],
    1,
    {"AUTO-90MB": ChosenTypes({}, 90_000_000, 0.05)},
)
COMPARISON = Comparison(
    chats=9, positions=312, held_out=True, base_loss=3.5, tuned_loss=2.1, recorded_base_loss=None,
    recorded_tuned_loss=None, checked=(),
    quantizations=(
        QuantizationFigures("AUTO-90MB", 90_000_000, 2.12, 0.1, 0.9, gain_kept=0.97, gain_kept_error=0.01),
        QuantizationFigures("Q8_0", 145_000_000, 2.1, 0.003, 0.99),
    ),
)  # fmt: skip


def test_the_prediction_is_corrected_by_what_was_measured() -> None:
    curve = size_curve(MIXTURES, COMPARISON)
    assert curve is not None and curve.factor == pytest.approx(2.0)
    assert curve.divergences == pytest.approx([0.8, 0.1, 0.002, 0.0])
    assert [figures.name for figures in curve.measured] == ["AUTO-90MB", "Q8_0"]


def test_without_a_comparison_it_is_the_prediction() -> None:
    curve = size_curve(MIXTURES, None)
    assert curve is not None and curve.factor == 1.0 and curve.divergences[0] == 0.4
    assert size_curve(None, COMPARISON) is None and size_curve(ChosenMixtures(), COMPARISON) is None


def test_the_charts_name_files_and_knee() -> None:
    curve = size_curve(MIXTURES, COMPARISON)
    assert curve is not None
    divergence, gains = size_charts(curve, StyleSheet())
    for word in ("predicted", "measured", "knee", "AUTO-90MB", "Q8_0", "90 MB, 0.100 nats"):
        assert word in divergence
    assert "AUTO-90MB" in gains and "Q8_0" not in gains
    assert len(size_charts(dataclasses.replace(curve, measured=()), StyleSheet())) == 1
