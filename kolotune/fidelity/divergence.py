"""How far two models' next-token distributions are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_ROWS = 64  # that are worked on at once: the files may be larger than memory


@dataclass(frozen=True)
class Divergence:
    """See `comparison.StageCheck` for the names."""

    top1_agreement: float
    kl_mean: float
    kl_p99: float


def between(before: np.ndarray, after: np.ndarray) -> Divergence:
    """KL(before || after) and agreement, position by position.

    Args:
        before, after: log-probabilities, fp32 ``[positions, words]``. Where one vocabulary has been padded to a
            longer one, the words that both have are compared.
    """
    import numpy as np

    words = min(before.shape[1], after.shape[1])
    divergences, same = [], 0
    for start in range(0, len(before), _ROWS):
        p = np.asarray(before[start : start + _ROWS, :words], np.float64)
        q = np.asarray(after[start : start + _ROWS, :words], np.float64)
        divergences.append((np.exp(p) * (p - q)).sum(axis=1))
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
    found = np.maximum(np.concatenate(divergences), 0.0)  # rounding makes nothing a little less than nothing
    return Divergence(same / len(before), float(found.mean()), float(np.quantile(found, 0.99)))
