"""What limits the scores of queries and keys besides their order: a sliding window, and a cap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What limits the scores of some layers.

    Attributes:
        window: tokens that a query sees, its own included; None for all.
        cap: c in ``c * tanh(score / c)`` (soft-capping, of Gemma 2); 0.0 for no cap.
    """

    window: int | None = None
    cap: float = 0.0


def hidden_keys(queries: int, front: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """Return which keys are hidden from which queries, bool ``[queries, front + queries]``.

    Args:
        queries: how many.
        front: keys in front of that of the first query.
        window: see `Limits`.
        device: of the result; None for the CPU.
    """
    everything = torch.ones(queries, front + queries, dtype=torch.bool, device=device)
    hidden = everything.triu(front + 1)
    return hidden if window is None else hidden | everything.tril(front - window)


def cap_scores(scores: Tensor, cap: float) -> tuple[Tensor, ...]:
    """Cap scores, in place; return by what their gradient is multiplied, nothing without a cap."""
    if not cap:
        return ()
    relative = scores.div_(cap).tanh_()
    slope = 1 - relative.square()
    relative.mul_(cap)
    return (slope,)
