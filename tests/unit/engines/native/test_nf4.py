"""Matrices in 4 bits: what is stored, and that training computes with exactly these weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.packed_models import chats_of, compare, pair_of
from torch import nn

from kolotune.engines.native import nf4
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.kernels import build
from kolotune.engines.native.kernels.compiled_operations import CompiledOperations
from kolotune.engines.native.lora import LoraLinear
from kolotune.engines.native.memory import NF4_BLOCK
from kolotune.engines.native.model import PackedModel, open_model
from kolotune.engines.native.nf4 import LEVELS, Nf4Product, quantize
from kolotune.engines.native.operations import Operations, PlainOperations

MakeTraining = Callable[..., Any]


@pytest.mark.parametrize("shape", [(3, 64), (7, 31), (1, 5)])
def test_each_weight_becomes_the_nearest_level_of_its_block(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[0, 0] = 0
    found = quantize(weight).dequantize(torch.float32)
    assert found.shape == weight.shape
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    levels = torch.tensor(LEVELS) * blocks.abs().amax(1)[:, None, None]
    nearest = (levels - blocks[:, :, None]).abs().amin(2)
    wanted = (found.flatten() - weight.flatten()).abs()
    torch.testing.assert_close(wanted, nearest.flatten()[: weight.numel()], atol=1e-7, rtol=1e-6)
    again = quantize(found).dequantize(torch.float32)
    assert torch.equal(again, found)


def test_blocks_of_zeros_stay_zero() -> None:
    assert not quantize(torch.zeros(2, 64)).dequantize(torch.bfloat16).any()


def test_pieces_are_quantized_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 96)
    whole = quantize(weight)
    monkeypatch.setattr(nf4, "NF4_AT_ONCE", 2 * NF4_BLOCK)
    pieces = quantize(weight)
    assert torch.equal(pieces.codes, whole.codes) and torch.equal(pieces.scales, whole.scales)
    assert torch.equal(pieces.dequantize(torch.float32), whole.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_and_values_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(48, 192).to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    found = quantize(weight)
    assert torch.equal(found.codes, codes.flatten()) and torch.equal(found.scales, state.absmax)
    assert torch.equal(found.dequantize(dtype), functional.dequantize_4bit(codes, state))
    assert torch.equal(found._dequantize_by_bitsandbytes(dtype), found.dequantize(dtype))


def test_products_are_those_of_the_dequantized_matrix() -> None:
    torch.manual_seed(0)
    weight, columns = torch.randn(6, 70), torch.randn(4, 2)
    product = Nf4Product(weight, 64)
    product.replace(slice(1, 5), slice(66, 68), columns)
    whole = torch.cat([quantize(weight[:, :64].contiguous()).dequantize(torch.float32), weight[:, 64:]], 1)
    whole[1:5, 66:68] = columns
    x, d_out, bias = torch.randn(5, 70), torch.randn(5, 6), torch.randn(6)
    torch.testing.assert_close(product.forward(x, bias), x @ whole.t() + bias)
    torch.testing.assert_close(product.backward(d_out), d_out @ whole)


def _operations(name: str) -> Operations:
    if name == "compiled":
        if build.reason_unavailable():
            pytest.skip(f"can't be compiled: {build.reason_unavailable()}")
        library = build.ensure("fp32")
        assert library is not None
        return CompiledOperations(library, torch.float32)
    return PlainOperations() if name == "plain" else DeviceOperations()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("name", ["plain", "compiled", "device"])
def test_training_in_4_bits_equals_training_on_the_dequantized_base(
    kind: str, name: str, make_training: MakeTraining
) -> None:
    job = make_training(kind, chats=chats_of(1, 6, 12, 30)).job()
    exact, plain = pair_of(job)
    packed = PackedModel(dataclasses.replace(job, load_in_4bit=True), operations=_operations(name))
    with torch.no_grad():
        packed.flat.parameter.copy_(exact.flat.parameter)
        for layer in plain.model.modules():
            if isinstance(layer, LoraLinear):
                layer.base.weight.copy_(quantize(layer.base.weight).dequantize(torch.float32))
    packed.updated()
    compare(job, packed, plain)


def test_a_base_in_4_bits_is_computed_by_the_decoder(make_training: MakeTraining) -> None:
    job = make_training().job(load_in_4bit=True)
    model = open_model(job, "cpu", 100)
    assert isinstance(model, PackedModel)
    frozen = [linear._product for layer in model.decoder.layers for linear in layer.linears]
    assert all(isinstance(product, Nf4Product) for product in frozen)
    assert not isinstance(model.decoder.head, Nf4Product), "as bitsandbytes leaves it"
