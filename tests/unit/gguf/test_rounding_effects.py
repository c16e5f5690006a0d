"""Rounding errors are ggml's, their effects the derivative along them, and error feedback makes them smaller."""

from __future__ import annotations

import numpy as np
import pytest

from kolotune.gguf.rounding_effects import RoundingEffects, effect, rounding_errors

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_errors_are_those_of_rounding() -> None:
    import torch

    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    errors = rounding_errors(weight, "Q8_0", None)
    step = weight.reshape(5, 2, 32).abs().amax(dim=2).repeat_interleave(32, dim=1) / 127
    assert (errors.abs() <= 0.51 * step + 1e-3 * weight.abs()).all() and errors.abs().max() > 0
    weighed = rounding_errors(weight, "Q4_0", np.linspace(0.01, 5, 64).astype(np.float32))
    assert not weighed.equal(rounding_errors(weight, "Q4_0", None))


def test_the_effect_is_the_derivative_along_the_errors() -> None:
    import torch

    generator = torch.Generator().manual_seed(2)
    weight, errors = (torch.randn(6, 32, generator=generator) for _ in range(2))
    inputs = torch.randn(4, 32, generator=generator)

    def score(matrix: torch.Tensor) -> torch.Tensor:
        return (inputs @ matrix.T).sin().sum(dim=1)

    outputs = (inputs @ weight.T).requires_grad_()
    (gradients,) = torch.autograd.grad(outputs.sin().sum(), outputs)
    small = 1e-3
    numeric = (score(weight + small * errors) - score(weight - small * errors)) / (2 * small)
    torch.testing.assert_close(effect(errors, inputs, gradients), numeric, rtol=1e-2, atol=1e-2)


def test_what_feedback_gains_is_measured() -> None:
    import torch

    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    weight, gradients = torch.randn(16, 64, generator=generator), torch.randn(300, 16, generator=generator)
    found = RoundingEffects()
    found.add_feedback("ffn_up", "Q4_0", weight, inputs, gradients)
    plain, compensated = found.feedback["ffn_up", "Q4_0"]
    assert 0 < compensated < 0.5 * plain


def test_a_tensor_that_is_used_twice_has_both_effects() -> None:
    import torch

    found = RoundingEffects()
    found.add("token_embd.weight", "Q8_0", torch.ones(3))
    found.add("token_embd.weight", "Q8_0", torch.ones(3))
    assert found.effects["token_embd.weight", "Q8_0"].tolist() == [2, 2, 2]
