"""The learning rate over the steps of a training; the formulas are those of transformers' schedules."""

from __future__ import annotations

import math


def learning_rate_factor(kind: str, step: int, steps: int, warmup_steps: int) -> float:
    """Return what the peak learning rate is multiplied by.

    Args:
        kind: "cosine", "linear" or "constant".
        step: number of the step, from 0.
        steps: number of all steps.
        warmup_steps: steps in which the rate rises from 0.
    """
    if step < warmup_steps:
        return step / max(1, warmup_steps)
    if kind == "constant":
        return 1.0
    rest = max(1, steps - warmup_steps)
    if kind == "linear":
        return max(0.0, (steps - step) / rest)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / rest)))
