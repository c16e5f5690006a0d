"""How far the next-token distributions of two models are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_POSITIONS = 16  # computed together: in the processor's cache, and the arrays may be larger than memory


@dataclass(frozen=True)
class Divergence:
    """Agreement and KL divergence over all positions; see `comparison.StageCheck` for the fields."""

    top1_agreement: float
    kl_mean: float
    kl_p99: float


def between(before: np.ndarray, after: np.ndarray) -> Divergence:
    """Return KL(before || after) and the agreement of the two.

    Args:
        before, after: log-probabilities, fp32 ``[positions, vocabulary]``. Where one vocabulary is padded to a
            greater length, the entries that both have are compared.
    """
    import numpy as np

    words = min(before.shape[1], after.shape[1])
    divergences, same = [], 0
    for start in range(0, len(before), _POSITIONS):
        p = np.asarray(before[start : start + _POSITIONS, :words])
        q = np.asarray(after[start : start + _POSITIONS, :words])
        # Of numbers that are close the difference is exact in fp32; only the sum needs more digits.
        divergences.append((np.exp(p) * (p - q)).sum(axis=1, dtype=np.float64))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    divergence = np.maximum(np.concatenate(divergences), 0.0)  # rounding can make a zero slightly negative
    return Divergence(same / len(before), float(divergence.mean()), float(np.quantile(divergence, 0.99)))
