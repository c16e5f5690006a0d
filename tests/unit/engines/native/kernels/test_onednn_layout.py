"""Matrices packed in oneDNN's layout give the same products as plain ones, before and after a change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kolotune.engines.native.kernels import build, onednn_layout
from kolotune.engines.native.kernels.compiled_operations import CompiledOperations
from kolotune.engines.native.matrix_product import PlainProduct

pytestmark = pytest.mark.skipif(
    bool(build.reason_unavailable()), reason=f"can't be compiled: {build.reason_unavailable()}"
)
SHAPES = [(960, 624), (72, 48), (31, 45), (130, 17)]


@pytest.fixture
def operations() -> CompiledOperations:
    torch.manual_seed(0)
    return CompiledOperations(build.ensure("bf16"), torch.bfloat16)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_equal_those_of_the_plain_matrix(operations: CompiledOperations, outputs: int, inputs: int) -> None:
    changing = inputs - 8
    weight = torch.randn(outputs, inputs).bfloat16()
    product, plain = operations.product(weight.clone(), changing), PlainProduct(weight)
    rows, columns = slice(3, outputs - 2), slice(changing + 1, inputs - 1)
    values = torch.randn(outputs - 5, 6)
    for each in (product, plain):
        each.replace(rows, columns, values)
    bias = torch.randn(outputs).bfloat16()
    for tokens in (1, 37, 700):
        x, d_out = torch.randn(tokens, inputs).bfloat16(), torch.randn(tokens, outputs).bfloat16()
        torch.testing.assert_close(product.forward(x, bias), plain.forward(x, bias), rtol=2e-2, atol=5e-2)
        torch.testing.assert_close(product.backward(d_out), plain.backward(d_out), rtol=2e-2, atol=5e-2)


def test_matrices_are_packed_where_the_layout_is_known(operations: CompiledOperations) -> None:
    """Only processors whose layout is known are checked."""
    about = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    if "avx512_bf16" not in about or "amx_bf16" in about:
        pytest.skip("another kind of processor")
    product = operations.product(torch.randn(64, 32).bfloat16(), 24)
    assert isinstance(product, onednn_layout.PackedProduct)


def test_an_unknown_layout_is_not_used(operations: CompiledOperations, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 32).bfloat16()

    def unknown(rows: int, columns: int) -> None:
        raise onednn_layout.LayoutError("another processor")

    monkeypatch.setattr(onednn_layout, "_layout", unknown)
    assert isinstance(operations.product(weight, 24), PlainProduct)


def test_a_layout_that_does_not_explain_the_matrix_is_not_used(
    operations: CompiledOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = torch.arange(63, -1, -1) * 32, torch.arange(32)
    monkeypatch.setattr(onednn_layout, "_layout", lambda rows, columns: wrong)
    assert isinstance(operations.product(torch.randn(64, 32).bfloat16(), 24), PlainProduct)
