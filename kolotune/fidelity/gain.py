"""The share of what training gained that is left in a file, by losses on the compared chats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .evidence import F16, Evidence
from .tasks import Figures, Reference

GAIN_KEPT = 0.8
"""Share of the gain that a quantization has to keep."""

# A smaller gain is not judged: a share of nearly nothing says nothing.
_NOTABLE_GAIN = 0.02  # nats
_NOTABLE_GAIN_OF_ONE_CHAT = 0.2
_STANDARD_ERRORS = 2.0
_ROUNDED_BACK = 0.5  # median share of the adapter's change in the matrices


@dataclass(frozen=True)
class GainKept:
    """A share, and its standard error over the chats; None: of one chat."""

    share: float
    error: float | None


def gain_kept(reference: Reference, figures: Figures) -> GainKept | None:
    """Return (loss of the base - loss of the file) / (loss of the base - loss of the tuned model).

    Returns:
        None where the file was not measured, or training gained nothing that stands out from the chats' differences.
    """
    if figures.loss is None or not math.isfinite(figures.loss):
        return None
    gain = reference.base_loss - reference.tuned_loss
    kept = reference.base_loss - figures.loss
    if not gain > _least_gain(reference):
        return None
    share = kept / gain
    if len(figures.chat_losses) != len(reference.chat_losses) or len(figures.chat_losses) < 2:
        return GainKept(share, None)
    # The ratio's error by its residuals, chat by chat.
    residuals = [
        (base - file) - share * (base - tuned)
        for (base, tuned), file in zip(reference.chat_losses, figures.chat_losses, strict=True)
    ]
    return GainKept(share, _error_of_sum(residuals) / (gain * sum(reference.chat_weights)))


def _least_gain(reference: Reference) -> float:
    gains = [base - tuned for base, tuned in reference.chat_losses]
    if len(gains) < 2:
        return _NOTABLE_GAIN_OF_ONE_CHAT
    mean = (reference.base_loss - reference.tuned_loss) * sum(reference.chat_weights) / len(gains)
    error = _error_of_sum([gain - mean for gain in gains]) / sum(reference.chat_weights)
    return max(_NOTABLE_GAIN, _STANDARD_ERRORS * error)


def _error_of_sum(residuals: Sequence[float]) -> float:
    """The standard error of a sum over chats."""
    count = len(residuals)
    return math.sqrt(sum(residual**2 for residual in residuals) * count / (count - 1))


def smallest_that_keeps(evidence: Evidence) -> tuple[str, float] | None:
    """Return the smallest measured quantization that keeps what training gained, and its share; None if none does."""
    keeping = []
    for measured in (*evidence.ggufs, *evidence.trials):
        gain = gain_kept(evidence.reference, measured.measurement.figures)
        if measured.gguf.name != F16 and measured.gguf.size is not None and gain is not None:
            keeping += [(measured.gguf.size, measured.gguf.name, gain.share)] if gain.share >= GAIN_KEPT else []
    return min(keeping)[1:] if keeping else None


def lost(evidence: Evidence) -> list[str]:
    """Return the run's quantizations that keep too little of what training gained."""
    gains = {each.gguf.name: gain_kept(evidence.reference, each.measurement.figures) for each in evidence.ggufs}
    return [name for name, gain in gains.items() if name != F16 and gain is not None and gain.share < GAIN_KEPT]


def rounded_back(evidence: Evidence) -> set[str]:
    """Return the quantizations in most of whose matrices little of the adapter's change is left."""
    names = set()
    for measured in evidence.ggufs:
        kept = [matrix.change_kept for matrix in measured.measurement.figures.survival]
        if kept and statistics.median(kept) < _ROUNDED_BACK:
            names.add(measured.gguf.name)
    return names
