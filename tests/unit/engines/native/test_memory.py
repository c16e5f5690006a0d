"""Memory formulas compared with the tensors and files of small real training runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import TrainingFolder, branching_chats, random_chats

from kolotune.engines.memory import BatchShape
from kolotune.engines.native import decoder, memory, sequence_packing
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.kernels import build
from kolotune.engines.native.model import PackedModel, TransformersModel
from kolotune.engines.native.trainer import Trainer
from kolotune.engines.native.training import train
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation.files import size_of
from kolotune.weights.model_shape import DTYPE_BYTES, AdapterShape, read_shape

MakeTraining = Callable[..., TrainingFolder]


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]])
def test_adapter_and_checkpoint_sizes_match_the_files(make_training: MakeTraining, targets: list[str]) -> None:
    folder = make_training(held_out=3, hidden_size=256, intermediate_size=512)
    job = folder.job(lora_rank=16, target_modules=targets, epochs=3, early_stopping=2)
    trainer = Trainer(job)
    train(job)
    adapter = AdapterShape.of(read_shape(folder.root / "base"), 16, targets)
    assert adapter.weight_count == trainer.parameter.numel()
    assert adapter.file_bytes == pytest.approx(size_of(Path(job.adapter)), rel=0.02)
    checkpoints = sorted(Path(job.checkpoints).iterdir())
    assert len(checkpoints) == 2
    assert adapter.checkpoint_bytes(keeps_best=True) == pytest.approx(size_of(checkpoints[-1]), rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_frozen_weights_in_4_bits_match_the_formula(make_training: MakeTraining, kind: str) -> None:
    folder = make_training(kind, hidden_size=128, intermediate_size=384)
    # Of rank 1: adapters' columns also have zeros beside the layers that are not theirs, which the formula leaves out.
    frozen = PackedModel(folder.job(load_in_4bit=True, lora_rank=1)).decoder
    products: list[Any] = [linear._product for layer in frozen.layers for linear in layer.linears]
    tensors = [each for product in products for each in (product._frozen.codes, product._frozen.scales, product._added)]
    tensors += [linear.down for layer in frozen.layers for linear in layer.linears]
    tensors += [frozen.embedding, *([] if frozen.head._weight is frozen.embedding else [frozen.head._weight])]  # type: ignore[attr-defined]
    shape = read_shape(folder.root / "base")
    formula = memory._frozen_bytes(shape, AdapterShape.of(shape, 1, ["all-linear"]), DTYPE_BYTES["fp32"], True)
    assert formula == pytest.approx(sum(each.nbytes for each in tensors), rel=0.03)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["padded", "long", "branches", "compiled", "compiled branches", "device"])
def test_layer_activations_match_the_formula(make_training: MakeTraining, dtype: str, attention: str) -> None:
    """Compare the formula with the bytes of the tensors that a forward pass keeps."""
    compiled = attention.startswith("compiled")
    if compiled and build.reason_unavailable():
        pytest.skip(f"can't be compiled: {build.reason_unavailable()}")
    lengths = (sequence_packing.LONG + 20, sequence_packing.LONG + 60) if attention == "long" else (30, 90)
    folder = make_training(
        chats=branching_chats(4, 1, longest=40) if "branches" in attention else random_chats(4, 1, *lengths),
        max_position_embeddings=1024,
        hidden_size=128,
        intermediate_size=384,
    )
    on_device = attention == "device"
    model = PackedModel(folder.job(dtype=dtype, compile=compiled), operations=DeviceOperations() if on_device else None)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    packed = sequence_packing.pack(tokens, range(len(tokens)), True)
    batch = packed.batch_shape(compiled or on_device)
    assert batch.padded == (attention == "padded")
    real = _bytes_kept(model, packed)
    shape = read_shape(folder.root / "base")
    adapter = AdapterShape.of(shape, 4, ["all-linear"])
    formula = memory.layer_activation_bytes(shape, adapter, batch, DTYPE_BYTES[dtype])
    assert formula == pytest.approx(real, rel=0.06)


@pytest.mark.parametrize("attention", ["padded", "compiled"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "olmo2"])
def test_layer_activations_of_other_families_match_the_formula(
    make_training: MakeTraining, kind: str, attention: str
) -> None:
    compiled = attention == "compiled"
    if compiled and build.reason_unavailable():
        pytest.skip(f"can't be compiled: {build.reason_unavailable()}")
    folder = make_training(kind, chats=random_chats(4, 1, 30, 90), hidden_size=128, intermediate_size=384)
    model = PackedModel(folder.job(compile=compiled))
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    packed = sequence_packing.pack(tokens, range(len(tokens)), True)
    shape = read_shape(folder.root / "base")
    batch, adapter = packed.batch_shape(compiled), AdapterShape.of(shape, 4, ["all-linear"])
    formula = memory.layer_activation_bytes(shape, adapter, batch, DTYPE_BYTES["fp32"])
    assert formula == pytest.approx(_bytes_kept(model, packed), rel=0.06)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_layer_activations_with_experts_stay_below_the_formula(make_training: MakeTraining, kind: str) -> None:
    """It counts a dense MLP beside the experts, which only some layers have."""
    folder = make_training(
        kind, chats=random_chats(4, 1, 30, 90), hidden_size=128, intermediate_size=384, moe_intermediate_size=384,
        num_local_experts=4, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = PackedModel(folder.job(target_parameters=["all-experts"]), operations=DeviceOperations())
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    packed = sequence_packing.pack(tokens, range(len(tokens)), True)
    shape = read_shape(folder.root / "base")
    adapter = AdapterShape.of(shape, 4, ["all-linear"], ["all-experts"])
    formula = memory.layer_activation_bytes(shape, adapter, packed.batch_shape(True), DTYPE_BYTES["fp32"])
    assert formula / 2 < _bytes_kept(model, packed) < formula


@pytest.mark.parametrize(("dtype", "length"), [("fp32", 90), ("bf16", 90), ("bf16", 300)])
def test_transformers_activations_match_the_formula(make_training: MakeTraining, dtype: str, length: int) -> None:
    shape_options = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3}
    folder = make_training(chats=random_chats(4, 1, length, length), max_position_embeddings=512, **shape_options)
    model = TransformersModel(folder.job(dtype=dtype, batch_size=4), "cpu")
    three, two = (_saved_bytes(model.model, layers, 4, length) for layers in (3, 2))
    shape = read_shape(folder.root / "base")
    batch = BatchShape(4 * length, 4, length, 0, 4, padded=False)
    adapter = AdapterShape.of(shape, 4, ["all-linear"])
    formula = memory.transformers_activation_bytes(shape, adapter, batch, DTYPE_BYTES[dtype])
    assert formula / 3 == pytest.approx(three - two, rel=0.15)


def _saved_bytes(model: Any, layers: int, chats: int, length: int) -> int:
    """Return the bytes of the distinct storages, without weights, that a forward pass of `layers` layers saves."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept, storages = [], {}

    def keep(tensor: Any) -> Any:
        kept.append(tensor)  # so that its memory is not reused
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    full, ids = model.model.layers, torch.ones(chats, length, dtype=torch.long)
    model.model.layers, model.model.config.num_hidden_layers = full[:layers], layers
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept.append(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits)
    model.model.layers, model.model.config.num_hidden_layers = full, len(full)
    return sum(storages.values())


def _bytes_kept(model: Any, packed: sequence_packing.PackedSequence) -> int:
    """Return the bytes of the distinct storages that the second layer's forward pass keeps."""
    sequence = decoder._SequencePass(model.decoder, packed)
    x, added = model.decoder.embedding[packed.ids], None
    for layer in model.decoder.layers:
        kept = decoder._SavedActivations(None)
        x, added = sequence.forward(layer, x, added, kept, False)
    tensors = [kept.x, *kept.tensors.values(), *kept.attention, *kept.mlp.tensors.values()]
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors if each is not None
    }
    return sum(storages.values())


def test_micro_batches_on_a_gpu_shrink_until_they_fit(make_training: MakeTraining) -> None:
    """What is refused is what does not fit even with the longest chat alone."""
    shape = read_shape(make_training(hidden_size=256, intermediate_size=1024).root / "base")
    adapter, batch = AdapterShape.of(shape, 4, ["all-linear"]), BatchShape(4096, 9, 700, 0, 2000, padded=False)

    def on_gpu(size: int, in_4bit: bool = False) -> tuple[int, bool]:
        gpu, recompute = memory.packed_on_gpu(shape, adapter, batch, 2, size, in_4bit=in_4bit)
        assert gpu.size == size
        return gpu.needed, recompute

    kept, recomputes = on_gpu(1 << 40)
    assert not recomputes
    recomputed, recomputes = on_gpu(kept)
    assert recomputes and recomputed < kept
    halved, _ = on_gpu(recomputed - 1)
    smallest, _ = on_gpu(1)
    assert smallest < halved < recomputed
    assert on_gpu(smallest) == (smallest, True)
    frozen = shape.layer_weight_count
    assert on_gpu(1 << 40, in_4bit=True)[0] - kept == pytest.approx(
        frozen * (0.5 + 4 / 64 - 2) + memory._dequantizing_bytes(shape, 2) - 2 * 96 * 256, abs=1000
    )
