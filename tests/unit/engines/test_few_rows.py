"""Few rows are multiplied in another way, with the same result."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3), (8, 1), (9, 1), (1, 40), (0, 1)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_same_products(shape: tuple[int, int], has_bias: bool) -> None:
    import torch

    from kolotune.engines import few_rows

    torch.manual_seed(1)
    plain = torch.nn.Linear(24, 50, bias=has_bias)
    model = few_rows.speed_up(torch.nn.Sequential(torch.nn.Linear(24, 50, bias=has_bias)))
    model[0].load_state_dict(plain.state_dict())
    inputs = torch.randn(*shape, 24)
    with torch.no_grad():
        actual, expected = model(inputs), plain(inputs)
    assert actual.is_contiguous() and actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-5)
