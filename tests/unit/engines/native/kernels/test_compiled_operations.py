"""The compiled operations compute what PyTorch computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kolotune.engines.native.architecture import Activation
from kolotune.engines.native.attention import Heads
from kolotune.engines.native.attention_limits import Limits
from kolotune.engines.native.kernels import build
from kolotune.engines.native.kernels.compiled_operations import (
    CompiledAttention,
    CompiledOperations,
    CompiledProduct,
)
from kolotune.engines.native.matrix_product import InputGradient, PlainProduct
from kolotune.engines.native.operations import LogitScaling, Norm, PlainOperations
from kolotune.engines.native.rotary import Rotary
from kolotune.engines.native.sequence_packing import PackedSequence

pytestmark = pytest.mark.skipif(
    bool(build.reason_unavailable()), reason=f"can't be compiled: {build.reason_unavailable()}"
)
PLAIN = PlainOperations()
NO_LIMITS = Limits()
ROWS, WIDTH, RANK = 13, 150, 6  # neither a multiple of what the processor takes at once


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    kind: torch.dtype = request.param
    return kind


@pytest.fixture
def compiled(dtype: torch.dtype) -> CompiledOperations:
    return CompiledOperations(build.ensure("fp32" if dtype == torch.float32 else "bf16"), dtype)


def close(found: Tensor, wanted: Tensor) -> None:
    tolerance = 2e-5 if found.dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def split(dtype: torch.dtype) -> InputGradient:
    return InputGradient(torch.randn(ROWS, WIDTH + RANK).to(dtype), WIDTH, torch.randn(RANK, WIDTH).mul(0.1).to(dtype))


@pytest.mark.parametrize("stored_less", [0, 1])
@pytest.mark.parametrize("adds", [False, True])
def test_norm(compiled: CompiledOperations, dtype: torch.dtype, adds: bool, stored_less: int) -> None:
    norm = Norm(torch.rand(WIDTH).to(dtype), 1e-5, stored_less)
    x, added = torch.randn(2, ROWS, WIDTH).to(dtype)
    results = []
    for operations in (compiled, PLAIN):
        result = torch.zeros(ROWS, WIDTH + RANK, dtype=dtype)
        total, factor = operations.norm(norm, x.clone(), added if adds else None, result[:, :WIDTH])
        assert not result[:, WIDTH:].any()
        results.append((result, total, factor))
    for found, wanted in zip(*results, strict=True):
        close(found, wanted)
    d_out, d_added = split(dtype), added if adds else None
    close(*(each.norm_backward(norm, d_out, x, results[1][2], d_added) for each in (compiled, PLAIN)))


@pytest.mark.parametrize("activation", Activation)
def test_gate(compiled: CompiledOperations, dtype: torch.dtype, activation: Activation) -> None:
    gate_up = torch.randn(ROWS, 2 * WIDTH).mul(4).to(dtype)
    found, wanted = torch.zeros(2, ROWS, WIDTH + RANK, dtype=dtype)
    for operations, result in ((compiled, found), (PLAIN, wanted)):
        operations.gate(activation, gate_up, result[:, :WIDTH])
    close(found, wanted)
    d_out = split(dtype)
    close(*(each.gate_backward(activation, d_out, gate_up) for each in (compiled, PLAIN)))


@pytest.mark.parametrize("activation", Activation)
def test_gate_of_large_numbers(compiled: CompiledOperations, dtype: torch.dtype, activation: Activation) -> None:
    """Gates stay finite where e^x would overflow."""
    gate_up = torch.tensor([[-300.0, -90.0, -1e-3, 0.0, 90.0, 300.0, *[2.0] * 6]]).to(dtype)
    found, wanted = torch.zeros(2, 1, 6, dtype=dtype)
    for operations, result in ((compiled, found), (PLAIN, wanted)):
        operations.gate(activation, gate_up, result)
    close(found, wanted)


@pytest.mark.parametrize("scaling", [LogitScaling(), LogitScaling(0.3), LogitScaling(1.0, 4.0), LogitScaling(0.3, 4.0)])
def test_cross_entropy(compiled: CompiledOperations, dtype: torch.dtype, scaling: LogitScaling) -> None:
    logits, targets = torch.randn(ROWS, 1000).mul(5).to(dtype), torch.randint(1000, (ROWS,))
    found, gradient = compiled.cross_entropy(logits.clone(), targets, 0.25, scaling)
    loss, wanted = PLAIN.cross_entropy(logits.clone(), targets, 0.25, scaling)
    # PyTorch rounds logits to bf16 again and again while it scales them.
    tolerance = 0.1 if dtype == torch.bfloat16 and scaling != LogitScaling() else 1e-5
    torch.testing.assert_close(found, loss, rtol=tolerance, atol=tolerance)
    close(gradient, wanted)
    one = torch.arange(ROWS)
    assert torch.equal(gradient[one, targets] < 0, wanted[one, targets] < 0)


@pytest.mark.parametrize("cap", [0.0, 4.0])
def test_nan_is_not_hidden(compiled: CompiledOperations, dtype: torch.dtype, cap: float) -> None:
    """The training loop stops at a loss that is not finite, so kernels must not hide it."""
    logits = torch.randn(2, 50).to(dtype)
    logits[1, 7] = float("nan")
    losses, gradient = compiled.cross_entropy(logits, torch.tensor([1, 2]), 1.0, LogitScaling(cap=cap))
    assert losses.isnan().tolist() == [False, True]
    assert gradient[1].isnan().any() and not gradient[0].isnan().any()
    result = torch.zeros(1, 4, dtype=dtype)
    compiled.gate(
        Activation.SILU, torch.tensor([[1.0, float("nan"), float("inf"), 1.0, 1.0, 1.0, 1.0, 2.0]]).to(dtype), result
    )
    assert result.isfinite().tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("rank", [1, 6, 16, 40])
@pytest.mark.parametrize("width", [WIDTH, 31])
def test_products_of_adapters(compiled: CompiledOperations, dtype: torch.dtype, rank: int, width: int) -> None:
    x = torch.randn(ROWS, width + rank).to(dtype)
    down, low = torch.randn(rank, width).mul(0.1).to(dtype), torch.randn(ROWS, rank + 3).to(dtype)[:, :rank]
    outputs, gradients, transposed = [], [], []
    for operations in (compiled, PLAIN):
        outputs.append(x.clone())
        operations.lower(outputs[-1][:, :width], down, outputs[-1][:, width:])
        gradients.append(torch.ones(rank, width))
        operations.add_product(gradients[-1], low, x[:, :width], 0.1)
        transposed.append(torch.ones(width, rank))
        operations.add_product(transposed[-1], x[:, :width], low, 0.1)
    close(*outputs)
    for found, wanted in (gradients, transposed):
        torch.testing.assert_close(found, wanted, rtol=2e-5 if dtype == torch.float32 else 3e-2, atol=1e-2)


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("lengths", [(7,), (3, 9, 1), (4, 4)])
@pytest.mark.parametrize("heads", [Heads(4, 2, 16), Heads(3, 1, 8), Heads(2, 2, 6)])
def test_attention(
    compiled: CompiledOperations, dtype: torch.dtype, prefix: int, lengths: tuple[int, ...], heads: Heads
) -> None:
    assert_same_attention(compiled, dtype, heads, prefix, lengths, (torch.arange(prefix),) * len(lengths))


@pytest.mark.parametrize("limits", [Limits(window=1), Limits(window=4), Limits(cap=0.7), Limits(window=130, cap=0.7)])
@pytest.mark.parametrize(("prefix", "lengths"), [(0, (7,)), (5, (3, 9, 1)), (9, (300, 20))])
def test_limited_attention(
    compiled: CompiledOperations, dtype: torch.dtype, prefix: int, lengths: tuple[int, ...], limits: Limits
) -> None:
    """Windows shorter than the chats and the prefix, and wider than what is computed at once."""
    fronts = (torch.arange(prefix),) * len(lengths)
    assert_same_attention(compiled, dtype, Heads(4, 2, 16), prefix, lengths, fronts, limits, rotated=4)


@pytest.mark.parametrize("limits", [Limits(), Limits(window=9), Limits(cap=0.7)])
@pytest.mark.parametrize("heads", [Heads(4, 2, 16), Heads(2, 2, 6)])
def test_attention_of_branches(compiled: CompiledOperations, dtype: torch.dtype, heads: Heads, limits: Limits) -> None:
    """A prefix of 5 tokens, a trunk of 40, a branch of it of 3, a branch of that of 21, and another chat of 1."""
    prefix = torch.arange(5)
    first = torch.cat([prefix, torch.arange(5, 30)])
    second = torch.cat([first[:28], torch.arange(45, 47)])
    assert_same_attention(compiled, dtype, heads, 5, (40, 3, 21, 1), (prefix, first, second, prefix), limits)


def assert_same_attention(
    compiled: CompiledOperations,
    dtype: torch.dtype,
    heads: Heads,
    prefix: int,
    lengths: tuple[int, ...],
    fronts: tuple[Tensor, ...],
    limits: Limits = NO_LIMITS,
    rotated: int = 0,
) -> None:
    """Assert that compiled and plain attention have the same results and gradients."""
    row = prefix + sum(lengths)
    parts = zip(fronts, lengths, strict=True)
    positions = torch.cat(
        [torch.arange(prefix), *(torch.arange(len(front), len(front) + length) for front, length in parts)]
    )
    nothing = torch.zeros(0, dtype=torch.int64)
    packed = PackedSequence(positions, positions, prefix, lengths, fronts, nothing, nothing)
    frequencies = 1.0 / 100.0 ** torch.linspace(0, 1, (rotated or heads.width) // 2)
    rotary = Rotary.of(positions, frequencies, dtype, heads.width**-0.25)
    qkv = torch.randn(row, heads.all * heads.width).to(dtype)
    width = heads.queries * heads.width
    d_out = InputGradient(torch.randn(row, width + RANK).to(dtype), width, torch.randn(RANK, width).mul(0.1).to(dtype))
    results = []
    for operations in (compiled, PLAIN):
        attention = operations.attention(packed, heads, rotary, limits)
        assert isinstance(attention, CompiledAttention) == (operations is compiled)
        result = torch.zeros(row, width + RANK, dtype=dtype)
        kept = attention.forward(qkv.clone(), result[:, :width])
        results.append((result, attention.backward(d_out, result[:, :width], kept).view(row, -1)))
    for found, wanted in zip(*results, strict=True):
        close(found, wanted)


def test_the_number_of_threads_changes_no_bit(compiled: CompiledOperations, dtype: torch.dtype) -> None:
    norm, d_out = Norm(torch.rand(WIDTH).to(dtype), 1e-5), split(dtype)
    x, factor = torch.randn(ROWS, WIDTH).to(dtype), torch.rand(ROWS, 1)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(compiled.norm_backward(norm, d_out, x, factor, None))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.fixture
def multiplying() -> CompiledOperations:
    operations = CompiledOperations(build.ensure("fp32"), torch.float32)
    if not isinstance(operations.product(torch.zeros(1, 1), 1), CompiledProduct):
        pytest.skip("the products of this processor are PyTorch's")
    torch.manual_seed(0)
    return operations


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("outputs", "inputs"), [(31, 45), (130, 17), (96, 700), (40, 5000), (5000, 40), (1, 1)])
def test_product(multiplying: CompiledOperations, outputs: int, inputs: int, stored: torch.dtype) -> None:
    """Of matrices whose sums are taken in several parts, too, of some whose numbers are all bf16, of rows far apart."""
    weight, bias, changing = torch.randn(outputs, inputs).to(stored).float(), torch.randn(outputs), inputs * 3 // 4
    product, plain = multiplying.product(weight.clone(), changing), PlainProduct(weight)
    assert isinstance(product, CompiledProduct) and product.frozen.dtype == (stored if changing else torch.bfloat16)
    values = torch.randn(outputs, 1)
    for each in (product, plain):
        each.replace(slice(0, outputs), slice(inputs - 1, inputs), values)
    for tokens in (0, 1, 3, 6, 8, 37):
        x, d_out = torch.randn(tokens, inputs + 3)[:, 2:-1], torch.randn(tokens, outputs)
        torch.testing.assert_close(product.forward(x, bias), plain.forward(x, bias), rtol=1e-5, atol=2e-4)
        torch.testing.assert_close(product.forward(x, None), plain.forward(x, None), rtol=1e-5, atol=2e-4)
        torch.testing.assert_close(product.backward(d_out), plain.backward(d_out), rtol=1e-5, atol=2e-4)


def test_the_number_of_threads_changes_no_bit_of_a_product(multiplying: CompiledOperations) -> None:
    product, x = multiplying.product(torch.randn(300, 900), 900), torch.randn(20, 900)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = product.forward(x, None)
        results.append(torch.cat([out, product.backward(out)], 1))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nan_goes_through_a_product(multiplying: CompiledOperations) -> None:
    x = torch.ones(7, 20)
    x[3, 4] = float("nan")
    out = multiplying.product(torch.ones(9, 20), 20).forward(x, None)
    assert out[3].isnan().all() and not out[[0, 1, 2, 4, 5, 6]].isnan().any()
