"""Rounding with feedback: closer in what a matrix computes, exactly what ggml reads, dead columns left alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from support.quantizing import matrix_and_inputs

from kolotune.gguf import header
from kolotune.gguf.block_layouts import block_layouts
from kolotune.gguf.error_feedback import input_statistics, restored_weight, round_with_feedback
from kolotune.gguf.stored_values import dequantized
from kolotune.llamacpp import ggml

pytestmark = pytest.mark.usefixtures("one_thread")


def by_ggml(weights: Any, kind: str, importance: np.ndarray) -> Any:
    import torch

    values = np.ascontiguousarray(weights.numpy())
    data = np.empty(header.size_of(values.shape, kind), np.uint8)
    ggml.library().ggml_quantize_chunk(
        header.type_number(kind), values.ctypes.data, data.ctypes.data, 0, *values.shape, importance.ctypes.data
    )
    return torch.from_numpy(dequantized(data, kind).reshape(values.shape))


@pytest.mark.parametrize("kind", sorted(block_layouts()))
def test_what_the_matrix_computes_is_closer_than_with_ggml(kind: str) -> None:
    weights, inputs = matrix_and_inputs()
    statistics = input_statistics(inputs)
    before = weights.clone()
    blocks, values = round_with_feedback(weights, kind, statistics)
    assert weights.equal(before)
    np.testing.assert_array_equal(dequantized(blocks.reshape(-1), kind).reshape(values.shape), values.numpy())

    def error(rounded: Any) -> float:
        return float(((rounded - weights) @ inputs.T).square().mean())

    assert error(values) < 0.5 * error(by_ggml(weights, kind, statistics.importance))
    again, _ = round_with_feedback(weights, kind, input_statistics(inputs))
    np.testing.assert_array_equal(again, blocks)


def test_a_dead_column_takes_no_error_and_keeps_a_value() -> None:
    weights, inputs = matrix_and_inputs(64)
    inputs[:, 40] = 0
    statistics = input_statistics(inputs)
    assert np.isfinite(statistics.importance).all() and (statistics.importance > 0).all()
    _, values = round_with_feedback(weights, "Q8_0", statistics)
    step = weights[:, 32:].abs().max() / 127
    assert float((values[:, 40] - weights[:, 40]).abs().max()) <= float(step)


@pytest.mark.parametrize("is_exact_known", [False, True])
def test_dead_columns_change_nothing_for_the_others(is_exact_known: bool) -> None:
    """Damping is a share of the mean over columns that get inputs: a widened model is rounded as it was."""
    import torch

    weights, inputs = matrix_and_inputs(64)
    exact = inputs * 1.1 if is_exact_known else None
    blocks, _ = round_with_feedback(weights, "Q4_0", input_statistics(inputs, exact))
    pad = partial(torch.nn.functional.pad, pad=(0, 192))
    statistics = input_statistics(pad(inputs), None if exact is None else pad(exact))
    widened, values = round_with_feedback(pad(weights), "Q4_0", statistics)
    assert (widened[:, : blocks.shape[1]] == blocks).all(axis=1).mean() > 0.9 and not values[:, 64:].any()


@pytest.mark.parametrize("inputs", ["zeros", "few", "alike"])
def test_inputs_without_full_rank_still_give_finite_values(inputs: str) -> None:
    weights, real = matrix_and_inputs(64)
    given = {"zeros": real * 0, "few": real[:3], "alike": real[:1].expand(50, -1)}[inputs]
    _, values = round_with_feedback(weights, "Q4_0", input_statistics(given))
    assert float((values - weights).abs().max()) < 1.0


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_what_the_inputs_have_lost_is_made_good(kind: str) -> None:
    """A matrix whose inputs lack a part that follows from the rest comes closer to the exact outputs."""
    import torch

    weights, exact = matrix_and_inputs(64)
    inputs = exact @ (torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))

    def error(values: Any) -> float:
        return float((inputs @ values.T - exact @ weights.T).square().mean())

    _, unaware = round_with_feedback(weights, kind, input_statistics(inputs))
    _, aware = round_with_feedback(weights, kind, input_statistics(inputs, exact))
    assert error(aware) < 0.3 * error(unaware)
    statistics = input_statistics(inputs)
    restored = restored_weight(weights, inputs, exact @ weights.T, statistics)
    _, by_outputs = round_with_feedback(restored, kind, statistics)
    torch.testing.assert_close(error(by_outputs), error(aware), rtol=0.05, atol=0)


def test_the_hessian_is_that_of_the_inputs() -> None:
    """It is computed in strips, the last of which is narrower."""
    _, inputs = matrix_and_inputs(70)
    hessian = input_statistics(inputs).hessian
    np.testing.assert_allclose(hessian.numpy(), (inputs.T @ inputs / len(inputs)).numpy(), rtol=1e-4, atol=1e-6)


def test_inputs_that_have_lost_nothing_change_nothing() -> None:
    weights, inputs = matrix_and_inputs(64)
    blocks, _ = round_with_feedback(weights, "Q4_0", input_statistics(inputs))
    same, _ = round_with_feedback(weights, "Q4_0", input_statistics(inputs, inputs.clone()))
    np.testing.assert_array_equal(same, blocks)


@pytest.mark.parametrize("inputs", ["zeros", "few"])
def test_what_was_lost_is_finite_without_full_rank(inputs: str) -> None:
    weights, real = matrix_and_inputs(64)
    given = {"zeros": real * 0, "few": real[:3]}[inputs]
    _, values = round_with_feedback(weights, "Q4_0", input_statistics(given, given * 1.1))
    assert float((values - weights).abs().max()) < 1.0


def test_columns_with_the_largest_inputs_come_first_by_whole_blocks() -> None:
    _, inputs = matrix_and_inputs(512)
    inputs[:, 70] *= 9  # the last column to be ordered, which is rounded first
    statistics = input_statistics(inputs)
    order = statistics.order
    assert sorted(order) == list(range(512)) and order[-1] == 70
    for size in (32, 256):
        assert all(len(set(group // size)) == 1 for group in order.reshape(-1, size))
    assert all((np.diff(statistics.importance[group]) >= 0).all() for group in order.reshape(-1, 32))
