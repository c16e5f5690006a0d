"""What each size of the model costs: the divergence that was predicted, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kolotune.fidelity.comparison import Comparison, QuantizationFigures
from kolotune.gguf.budgets import ChosenMixtures


@dataclass(frozen=True)
class SizeCurve:
    """A curve, and the measured files beside it.

    Attributes:
        sizes: bytes of files, smallest first.
        divergences: mean KL that is predicted for them, in nats, times `factor`.
        knee: number of the size behind which more bytes gain little.
        factor: by which measured divergences differ from predicted ones, on average; 1.0 where none was measured.
        measured: quantizations that were compared.
    """

    sizes: list[int]
    divergences: list[float]
    knee: int
    factor: float
    measured: Sequence[QuantizationFigures]


def size_curve(mixtures: ChosenMixtures | None, comparison: Comparison | None) -> SizeCurve | None:
    """Return the curve of a run; None where it has no quantization to a budget."""
    if mixtures is None or not mixtures.curve:
        return None
    measured = comparison.quantizations if comparison else ()
    ratios = [
        math.log(figures.kl_mean / chosen.predicted_kl)
        for figures in measured
        if (chosen := mixtures.chosen.get(figures.name)) and chosen.predicted_kl > 0 and figures.kl_mean > 0
    ]
    factor = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
    sizes, divergences = [point.size for point in mixtures.curve], [factor * point.kl for point in mixtures.curve]
    return SizeCurve(sizes, divergences, mixtures.knee, factor, measured)
