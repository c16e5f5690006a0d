"""The learning rate, compared with the schedules of transformers."""

from __future__ import annotations

import pytest
import torch
import transformers

from kolotune.engines.native.learning_rate import learning_rate_factor

JUDGES = {
    "cosine": transformers.get_cosine_schedule_with_warmup,
    "linear": transformers.get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, steps: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("kind", JUDGES)
@pytest.mark.parametrize(("steps", "warmup"), [(20, 0), (20, 1), (20, 5), (1, 0), (7, 7), (7, 9), (300, 30)])
def test_rates_equal_those_of_transformers(kind: str, steps: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    judge = JUDGES[kind](optimizer, warmup, steps)
    for step in range(steps):
        wanted = optimizer.param_groups[0]["lr"]
        assert learning_rate_factor(kind, step, steps, warmup) == pytest.approx(wanted, abs=1e-12), step
        optimizer.step()
        judge.step()
