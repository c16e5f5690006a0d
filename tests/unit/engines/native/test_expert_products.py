"""Products with experts' weights: one by one and grouped, the same, whatever rows the experts have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kolotune.engines.native.expert_products import CountedProducts, ExpertProducts, GroupedProducts, products_for

ROWS = {"some": [3, 0, 7, 1], "none at the ends": [0, 5, 2, 0], "one has all": [0, 0, 11, 0], "no rows": [0, 0, 0, 0]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("products", [CountedProducts(), GroupedProducts()])
@pytest.mark.parametrize("rank", [3, 8])
def test_products_are_those_of_each_expert(rows: list[int], products: ExpertProducts, rank: int) -> None:
    torch.manual_seed(0)
    experts = torch.tensor([number for number, count in enumerate(rows) for _ in range(count)], dtype=torch.int64)
    groups = products.groups(experts, 4)
    weights, x = torch.randn(4, 24, rank), torch.randn(len(experts), rank)
    each = weights[experts]
    expected = torch.einsum("roi,ri->ro", each, x)
    torch.testing.assert_close(products.forward(x, weights, groups), expected)
    out = torch.ones_like(expected)
    products.add_forward(out, x, weights, groups, 0.5)
    torch.testing.assert_close(out, 1 + 0.5 * expected)
    d_out = torch.randn(len(experts), 24)
    torch.testing.assert_close(products.backward(d_out, weights, groups), torch.einsum("roi,ro->ri", each, d_out))
    gradient = torch.ones(4, 24, rank)
    products.add_gradient(gradient, d_out, x, groups, 2.0)
    for number in range(4):
        own = experts == number
        torch.testing.assert_close(gradient[number], 1 + 2 * d_out[own].t() @ x[own])


def test_large_weights_are_not_copied() -> None:
    weights, x = torch.randn(2, 16, 8), torch.randn(3, 8)
    groups = GroupedProducts().groups(torch.tensor([0, 1, 1]), 2)
    with Pads() as pads:
        d_out = GroupedProducts().forward(x, weights, groups)
        GroupedProducts().backward(d_out, weights, groups)
    assert not pads.count


class Pads(TorchDispatchMode):
    """Counts the operations that would copy a tensor to pad it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in ("aten::constant_pad_nd", "aten::clone")
        return func(*args, **(kwargs or {}))


def test_devices_that_have_no_grouped_kernel_count() -> None:
    assert isinstance(products_for(torch.device("mps"), torch.bfloat16), CountedProducts)
    assert isinstance(products_for(torch.device("cuda"), torch.float32), CountedProducts)
