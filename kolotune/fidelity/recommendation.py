"""Which quantization is recommended, by its loss for its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from .comparison import QuantizationFigures

# A good quantization loses at most this share of what training gained, or this many nats.
_LOSS_LOST, _LOSS_UNNOTICED = 0.05, 0.01


class RecommendationReason(Enum):
    """Why a quantization is recommended."""

    SMALLEST_GOOD = "smallest good"
    SMALLEST_LOSS = "smallest loss"


@dataclass(frozen=True)
class Recommendation:
    """A recommended quantization, and the loss of the tuned model it was judged by."""

    quantization: QuantizationFigures
    reason: RecommendationReason
    tuned_loss: float


def recommend(
    quantizations: Sequence[QuantizationFigures], base_loss: float, tuned_loss: float
) -> Recommendation | None:
    """Return the smallest good quantization, else the best one; None where there are fewer than two."""
    if len(quantizations) < 2:
        return None
    allowed = tuned_loss + max(_LOSS_LOST * (base_loss - tuned_loss), _LOSS_UNNOTICED)
    good = [figures for figures in quantizations if figures.loss <= allowed]
    if good:
        smallest = min(good, key=lambda figures: figures.size_bytes)
        return Recommendation(smallest, RecommendationReason.SMALLEST_GOOD, tuned_loss)
    best = min(quantizations, key=lambda figures: figures.loss)
    return Recommendation(best, RecommendationReason.SMALLEST_LOSS, tuned_loss)


def describe_recommendation(recommendation: Recommendation) -> str:
    """Return why a quantization is recommended, and how to make it where it is not kept."""
    figures = recommendation.quantization
    if recommendation.reason is RecommendationReason.SMALLEST_GOOD:
        sentence = (
            f"the smallest whose loss ({figures.loss:.4f}) is close to that of the tuned model "
            f"({recommendation.tuned_loss:.4f})"
        )
    else:
        sentence = "all lose a notable part of what was learned, and this one the least"
    if not figures.kept:
        sentence += f"; `kolotune quantize RUN --quantization {figures.name}` makes it"
    return sentence
