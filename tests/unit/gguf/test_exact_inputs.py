"""The exact model's inputs: kept for each matrix of a layer, handed out once, and only for the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kolotune.gguf import exact_inputs
from kolotune.gguf.exact_inputs import Exact, ExactInputs


class Layer(nn.Module):
    """Two matrices, one behind the other; returns a tuple as older layers do, if it is to."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)
        self.returns_tuple = returns_tuple

    def forward(self, hidden: torch.Tensor, shift: float, *, scale: float) -> Any:
        output = hidden + scale * self.second(self.first(hidden)) + shift
        return (output, None) if self.returns_tuple else output


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_each_layer_gets_what_the_exact_one_before_it_gives(returns_tuple: bool) -> None:
    hidden = torch.randn(2, 3, 4)
    layers = [Layer(returns_tuple), Layer(returns_tuple)]
    exact, expected = ExactInputs(hidden), hidden
    for layer in layers:
        exact.run(layer, {"first": layer.first, "second": layer.second}, (0.5,), {"scale": 2.0})
        first, second = exact.take("first", hidden), exact.take("second", torch.empty(2, 3, 6))
        assert first.inputs is not None and first.outputs is None
        torch.testing.assert_close(first.inputs, expected.reshape(6, 4))
        assert second.outputs is not None and second.inputs is None, "it has fewer rows than columns"
        without_bias = layer.first(expected) @ layer.second.weight.T
        torch.testing.assert_close(second.outputs, without_bias.reshape(6, 4))
        assert exact.take("first", hidden) == Exact(), "what was taken is forgotten"
        assert not layer.first._forward_hooks
        output = layer(expected, 0.5, scale=2.0)
        expected = output[0] if returns_tuple else output


def test_narrow_matrices_that_read_the_same_have_its_inputs_kept() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(4, 3), nn.Linear(4, 2, bias=False)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = hidden + self.query(hidden).sum() + self.key(hidden).sum()
            return output

    hidden, layer = torch.randn(2, 3, 4), Heads()
    exact = ExactInputs(hidden)
    exact.run(layer, {"query": layer.query, "key": layer.key}, (), {})
    assert [exact.take(name, hidden).outputs for name in ("query", "key")] == [None, None]
    exact.run(layer, {"key": layer.key}, (), {})
    assert exact.take("key", hidden).inputs is None


def test_tokens_of_an_expert_may_be_others() -> None:
    hidden, layer = torch.randn(2, 3, 4), Layer(False)
    exact = ExactInputs(hidden)
    exact.run(layer, {"first": layer.first}, (0.0,), {"scale": 1.0})
    assert exact.take("first", torch.empty(5, 4)) == Exact()
    exact.run(layer, {"first": layer.first}, (0.0,), {"scale": 1.0})
    exact._kept["first"] = Exact(inputs=torch.empty(5, 4))
    assert exact.take("first", torch.empty(5, 4)) == Exact(), "as many, but not all"


def test_some_rows_at_a_time_give_what_all_do() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.last = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(5, 4)

        def forward(self, hidden: torch.Tensor, mask: torch.Tensor, *, turns: tuple[torch.Tensor, ...]) -> torch.Tensor:
            mixed = torch.cat([self.query(hidden), self.key(hidden)], dim=-1) * mask
            output: torch.Tensor = hidden + self.last(mixed) + turns[0]
            return output

    count = 2 * exact_inputs._ROWS + 1
    hidden, mask, turn, layer = torch.randn(count, 3, 4), torch.rand(count, 3, 5), torch.randn(1, 3, 4), Masked()
    exact = ExactInputs(hidden)
    matrices = {"query": layer.query, "key": layer.key, "last": layer.last}
    for _ in range(2):
        expected = layer(hidden, mask, turns=(turn,))
        exact.run(layer, matrices, (mask,), {"turns": (turn,)})
        query, key, last = (
            exact.take(name, torch.empty(count, 3, each.in_features)) for name, each in matrices.items()
        )
        assert query.inputs is not None and key.inputs is not None and last.outputs is not None
        torch.testing.assert_close(query.inputs, hidden.reshape(-1, 4))
        assert query.inputs.data_ptr() == key.inputs.data_ptr(), "they take memory once"
        without_bias = expected - hidden - turn - layer.last.bias
        torch.testing.assert_close(last.outputs, without_bias.reshape(-1, 4))
        hidden = expected
