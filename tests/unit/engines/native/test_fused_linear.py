"""Linear layers with their adapters as one product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kolotune.engines.native.fused_linear import FusedLinear
from kolotune.engines.native.lora import FlatAdapters, LoraPair
from kolotune.engines.native.operations import PlainOperations


@pytest.fixture
def memory_without_numbers() -> Iterator[None]:
    """Fill new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("inputs", [62, 872])
def test_what_memory_held_before_is_not_read(inputs: int, memory_without_numbers: None) -> None:
    pair = LoraPair(inputs, 40, 8, 8.0, 0.0)
    linear = FusedLinear(PlainOperations(), [torch.randn(40, inputs).bfloat16()], [None], [pair])
    linear.join(FlatAdapters({"a": pair}, [("a", "lora_A"), ("a", "lora_B")]))
    linear.refresh()
    x = linear.new_input(232)
    x[:, :inputs] = torch.randn(232, inputs)
    assert linear.forward(x).isfinite().all()
