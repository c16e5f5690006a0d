"""Products with experts' weights: one by one and grouped, the same, whatever rows the experts have."""

from __future__ import annotations

import pytest
import torch

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


def test_devices_that_have_no_grouped_kernel_count() -> None:
    assert isinstance(products_for(torch.device("mps"), torch.bfloat16), CountedProducts)
    assert isinstance(products_for(torch.device("cuda"), torch.float32), CountedProducts)
