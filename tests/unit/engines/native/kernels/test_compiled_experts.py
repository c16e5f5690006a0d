"""The compiled products of experts are PyTorch's, whatever rows the experts have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kolotune.engines.native.expert_linear import ExpertRows, PlainExpertLinear
from kolotune.engines.native.expert_lora import LoraExpertWeight
from kolotune.engines.native.expert_products import CountedProducts
from kolotune.engines.native.kernels import build
from kolotune.engines.native.kernels.compiled_experts import CompiledExpertLinear
from kolotune.engines.native.kernels.compiled_operations import CompiledOperations

pytestmark = pytest.mark.skipif(not build.multiplies(), reason="this processor's products are PyTorch's")
ROWS = {"some": [3, 0, 7, 1], "none at the ends": [0, 5, 2, 0], "one has all": [0, 0, 140, 0], "no rows": [0, 0, 0, 0]}
OUTPUTS, INPUTS = 150, 700  # neither a multiple of what is computed at once, and more numbers than are summed at once


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("rank", [0, 3, 16, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_products_are_those_of_pytorch(rows: list[int], rank: int, dropout: float, stored: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, OUTPUTS, INPUTS).to(stored)
    linears = (_compiled(weight), PlainExpertLinear(CountedProducts(), weight.float()))
    assert linears[0].weight.dtype == stored
    if rank:
        for linear in linears:
            linear.update = _update(weight, rank, dropout)
    tokens, d_tokens = torch.randn(50, INPUTS + 9)[:, :INPUTS], torch.randn(50, OUTPUTS)
    index = torch.randint(50, (sum(rows),))
    results: list[list[Tensor]] = []
    for linear in linears:
        torch.manual_seed(1)
        masks: list[Tensor] = []
        out, low = linear.forward(ExpertRows(tokens, index), rows, masks)
        assert bool(masks) == bool(rank and dropout)
        d_x = linear.backward(ExpertRows(d_tokens, index), ExpertRows(tokens, index), low, rows, masks)
        gathered = linear.forward(ExpertRows(tokens[index]), rows, None)[0]
        results.append([out, d_x, gathered])
        if linear.update is not None:
            results[-1] += [each for each in (linear.update.lora_A.grad, linear.update.lora_B.grad) if each is not None]
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(
            found, wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()) if len(wanted) else 0
        )


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    linear = _compiled(torch.randn(4, OUTPUTS, INPUTS))
    tokens, rows = torch.randn(151, INPUTS), [20, 1, 0, 130]
    threads, results = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        linear.update = _update(linear.weight, 5, 0.0)
        out, low = linear.forward(ExpertRows(tokens), rows, None)
        results.append(
            (out, linear.backward(ExpertRows(out), ExpertRows(tokens), low, rows, None), linear.update.lora_B.grad)
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True) if pair[0] is not None)


def _compiled(weight: Tensor) -> CompiledExpertLinear:
    linear = CompiledOperations(build.ensure("fp32"), torch.float32).expert_linear(weight, CountedProducts())
    assert isinstance(linear, CompiledExpertLinear)
    return linear


def _update(weight: Tensor, rank: int, dropout: float) -> LoraExpertWeight:
    torch.manual_seed(2)
    update = LoraExpertWeight(weight, "experts.down_proj", False, rank, 2.0, dropout)
    torch.nn.init.normal_(update.lora_B)
    update.lora_A.grad, update.lora_B.grad = torch.ones_like(update.lora_A), torch.ones_like(update.lora_B)
    return update.requires_grad_(False)
