"""A base in the blocks of a GGUF: training computes with exactly these weights, and refuses what it can't."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.block_folders import quantize_folder
from support.packed_models import chats_of, compare, pair_of

from kolotune.engines.engine import get_engine
from kolotune.engines.memory import SMALLEST_BATCH
from kolotune.engines.native import block_matrix, memory
from kolotune.engines.native.block_matrix import BlockFiles
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.matrix_product import DequantizedProduct
from kolotune.engines.native.model import PackedModel
from kolotune.engines.native.operations import Operations, PlainOperations
from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError
from kolotune.weights.model_shape import AdapterShape, read_shape

MakeTraining = Callable[..., Any]
TYPES = {"q_proj": "Q4_0", "k_proj": "Q4_0", "v_proj": "Q8_0", "up_proj": "Q5_0", "down_proj": "Q5_1"}
_PHI = {"qkv_proj": "Q8_0", "gate_up_proj": "Q4_1"}


@pytest.mark.parametrize(
    ("kind", "types", "operations"),
    [("llama", TYPES, PlainOperations()), ("qwen3", TYPES, DeviceOperations()), ("phi3", _PHI, PlainOperations())],
)
def test_training_equals_that_on_the_dequantized_folder(
    kind: str, types: dict[str, str], operations: Operations, make_training: MakeTraining, monkeypatch: Any
) -> None:
    monkeypatch.setattr(block_matrix, "BLOCKS_AT_ONCE", 300)  # several rows at a time, and some left
    training = make_training(kind, chats=chats_of(1, 6, 12, 30))
    quantize_folder(training.root / "base", types)
    job = training.job()
    exact, plain = pair_of(job)
    packed = PackedModel(dataclasses.replace(job, load_in_4bit=True), operations=operations)
    products = [linear._product for layer in packed.decoder.layers for linear in layer.linears]
    assert all(isinstance(product, DequantizedProduct) for product in products)
    with torch.no_grad():
        packed.flat.parameter.copy_(exact.flat.parameter)
    packed.updated()
    compare(job, packed, plain)


def test_the_product_is_that_of_the_values(make_training: MakeTraining) -> None:
    base = make_training().root / "base"
    quantize_folder(base, TYPES)
    weight = torch.randn(6, 64)
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in ("q", "v")]
    files = BlockFiles(base, torch.device("cpu"))
    product = files.product(
        [names[0], "whole", names[1]], [torch.empty(64, 64), weight, torch.empty(32, 64)], torch.randn(102, 3)
    )
    stored = block_matrix.TensorFiles([base / "model.safetensors"])
    whole = torch.cat([stored.read(names[0]), weight, stored.read(names[1])])
    assert torch.equal(product._frozen.dequantize(torch.float32), whole)
    assert torch.equal(product._frozen.dequantize(torch.bfloat16), whole.bfloat16())


def test_memory_is_that_of_the_tensors(make_training: MakeTraining) -> None:
    training = make_training()
    quantize_folder(training.root / "base", TYPES)
    shape = read_shape(training.root / "base")
    adapter = AdapterShape.of(shape, 16, ["all-linear"])
    model = PackedModel(training.job(load_in_4bit=True, lora_rank=16))
    products = [linear._product for layer in model.decoder.layers for linear in layer.linears]
    found = sum(_bytes(part) for product in products for part in product._frozen._parts)
    around = 4 * (shape.weight_count - shape.dense_weight_count + adapter.weight_count)
    assert memory._frozen_bytes(shape, adapter, 4, True) == found + around
    step = (shape, adapter, SMALLEST_BATCH, 4, False)
    assert memory._packed_step_bytes(*step, True) > memory._packed_step_bytes(*step, False)


def _bytes(part: Any) -> int:
    tensor = part if isinstance(part, torch.Tensor) else part._rows
    return int(tensor.numel() * tensor.element_size())


@pytest.mark.parametrize(
    ("engine", "kind", "types", "reason"),
    [
        ("torchtune", "llama", TYPES, "torchtune does not compute"),
        ("native", "gpt2", {}, "its architecture is gpt2"),
        ("native", "llama", {"q_proj": "IQ4_NL"}, "blocks of type IQ4_NL"),
    ],
)
def test_what_can_not_be_trained_in_blocks_is_refused(
    engine: str, kind: str, types: dict[str, str], reason: str, tiny_model: Any, tmp_path: Path
) -> None:
    tiny_model(kind, tmp_path)
    quantize_folder(tmp_path, types)
    config = Config(load_in_4bit=True)
    with pytest.raises(ConfigError, match=reason):
        get_engine(engine).check(config, tmp_path)
