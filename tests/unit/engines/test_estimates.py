"""The formulas against real small things: files as they are written, tensors as they are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import TrainingFolder, random_chats

from kolotune.engines import estimates
from kolotune.engines.estimates import Adapter, Row, Written, checkpoints_written, peak_of
from kolotune.engines.native import packing
from kolotune.engines.native.kernels import build
from kolotune.engines.native.model import PlainModel
from kolotune.engines.native.training import Trainer, train
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation.files import size_of

Room = Callable[..., TrainingFolder]


def test_a_shape_is_read_without_its_weights(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "base", dtype="bfloat16")
    shape = estimates.read_shape(tmp_path / "base")
    assert shape.weights == sum(each.numel() for each in model.parameters())
    assert shape.stored == 2 * shape.weights
    assert (shape.layers, shape.width, shape.queries, shape.keys, shape.head) == (2, 64, 4, 2, 16)
    assert not shape.tied
    assert len(shape.of_layer()) == 7


@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", "down_proj"]])
def test_an_adapter_and_its_checkpoints_are_as_large_as_foretold(training_room: Room, targets: list[str]) -> None:
    room = training_room(held_out=3, hidden_size=256, intermediate_size=512)
    job = room.job(lora_rank=16, target_modules=targets, epochs=3, early_stopping=2)
    trainer = Trainer(job)
    train(job)
    adapter = Adapter.of(estimates.read_shape(room.root / "base"), 16, targets)
    assert adapter.weights == trainer.parameter.numel()
    assert adapter.file == pytest.approx(size_of(Path(job.adapter)), rel=0.02)
    checkpoints = sorted(Path(job.checkpoints).iterdir())
    assert len(checkpoints) == 2
    foretold = adapter.checkpoint(keeps_best=True)
    assert foretold == pytest.approx(size_of(checkpoints[-1]), rel=0.02)


@pytest.mark.parametrize(
    ("in_epoch", "epochs", "every", "written"),
    [(5, 3, 0, 3), (5, 3, 2, 9), (4, 2, 2, 4), (250, 1, 100, 3), (5, 0, 2, 0)],
)
def test_checkpoints_are_counted(in_epoch: int, epochs: int, every: int, written: int) -> None:
    by_hand = epochs + sum(
        1 for step in range(1, in_epoch * epochs + 1) if every and step % every == 0 and step % in_epoch
    )
    assert checkpoints_written(in_epoch, epochs, every) == by_hand == written


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["padded", "long", "compiled"])
def test_what_a_layer_keeps_is_what_the_formula_says(training_room: Room, dtype: str, attention: str) -> None:
    """Against the bytes of the tensors that a forward pass keeps."""
    compiled = attention == "compiled"
    if compiled and build.why_not():
        pytest.skip(f"can't be compiled: {build.why_not()}")
    lengths = (packing.LONG + 20, packing.LONG + 60) if attention == "long" else (30, 90)
    room = training_room(
        chats=random_chats(4, 1, *lengths), max_position_embeddings=1024, hidden_size=128, intermediate_size=384
    )
    trainer = Trainer(room.job(dtype=dtype, compile=compiled))
    tokens = PreparedTokens.load(room.root / "data" / "train.safetensors")
    packed = packing.pack(tokens, range(len(tokens)), True)
    lengths_of = [*([packed.prefix] if packed.prefix else []), *packed.lengths]
    row = Row(len(packed.ids), len(lengths_of), max(lengths_of), packed.prefix, packed.labels, attention == "padded")
    real = _bytes_kept(trainer.model, packed)
    shape = estimates.read_shape(room.root / "base")
    adapter = Adapter.of(shape, 4, ["all-linear"])
    assert estimates.kept_by_layer(shape, adapter, row, estimates.WIDTHS[dtype]) == pytest.approx(real, rel=0.06)


@pytest.mark.parametrize(("dtype", "length"), [("fp32", 90), ("bf16", 90), ("bf16", 300)])
def test_what_transformers_keeps_of_a_layer_is_what_the_formula_says(
    training_room: Room, dtype: str, length: int
) -> None:
    shape_options = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3}
    room = training_room(chats=random_chats(4, 1, length, length), max_position_embeddings=512, **shape_options)
    model = PlainModel(room.job(dtype=dtype, batch_size=4), "cpu")
    three, two = (_saved_bytes(model.model, layers, 4, length) for layers in (3, 2))
    shape = estimates.read_shape(room.root / "base")
    row = Row(4 * length, 4, length, 0, 4, padded=False)
    foretold = estimates.kept_by_transformers(shape, Adapter.of(shape, 4, ["all-linear"]), row, estimates.WIDTHS[dtype])
    assert foretold / 3 == pytest.approx(three - two, rel=0.15)


def _saved_bytes(model: Any, layers: int, chats: int, length: int) -> int:
    """Bytes of the distinct storages, weights left out, that a forward pass of so many layers saves."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept, storages = [], {}

    def keep(tensor: Any) -> Any:
        kept.append(tensor)  # so that no other one gets its place
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


def _bytes_kept(model: Any, packed: packing.Packed) -> int:
    """Bytes of the distinct storages that the second layer's forward pass holds on to."""
    from kolotune.engines.native import decoder

    row = decoder._Row(model.decoder, packed)
    x, added = model.decoder.embedding[packed.ids], None
    for layer in model.decoder.layers:
        kept = decoder._Kept(None)
        x, added = row.forward(layer, x, added, kept, False)
    tensors = [kept.x, *kept.tensors.values(), *kept.attention]
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors if each is not None
    }
    return sum(storages.values())


def test_the_peak_on_the_disk_counts_what_is_replaced_and_what_passes() -> None:
    first_time = [Written(10), Written(100, passes=30), Written(5)]
    assert peak_of(first_time) == (140, 115)
    again = [Written(10, replaced=10), Written(100, passes=30, replaced=100)]
    assert peak_of(again) == (130, 0)
