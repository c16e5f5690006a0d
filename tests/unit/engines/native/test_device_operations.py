"""The step for GPUs: its results on the CPU, through the same classes, and that the host never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed_models import chats_of, compare, pair_of
from support.training import branching_chats
from torch.utils._python_dispatch import TorchDispatchMode
from unit.engines.native.test_families import MODELS

from kolotune.engines.native import trainer as trainers
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.model import PackedModel
from kolotune.engines.native.varlen_attention import FlashKernel, PlainKernel
from kolotune.engines.prepared_tokens import PreparedTokens

MakeTraining = Callable[..., Any]
KINDS = {"llama": ("llama", {}), **MODELS}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_those_of_transformers(kind: str, make_training: MakeTraining) -> None:
    name, more = KINDS[kind]
    chats = [*branching_chats(2, 5, system=12, longest=20), *chats_of(2, 3, 12, 150)]
    job = make_training(name, chats=chats, **more).job()
    models = pair_of(job, DeviceOperations())
    compare(job, *models)
    compare(job, *models, share=False)


def test_dropout_is_the_same_when_activations_are_recomputed(make_training: MakeTraining) -> None:
    job = make_training(chats=chats_of(5, 6, 12, 40)).job(lora_dropout=0.4)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    results = []
    for recompute in (False, True):
        model, _ = pair_of(job, DeviceOperations())
        model._recomputes = lambda packed, wanted=recompute: wanted  # type: ignore[method-assign, misc]
        torch.manual_seed(9)
        results.append((model.backward(tokens, range(6), 0.1), model.flat.parameter.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and torch.equal(results[0][1], results[1][1])


class _OnDevice(TorchDispatchMode):
    """Refuses operations that read values of a device's tensors, and those of tensors on two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_device = [each for each in tensors if each.is_meta]
        name = func.name()
        if on_device:
            self.names.add(name)
            assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"), f"{name} waits"
            assert name == "aten::copy_" or len(on_device) == len(tensors), f"{name} mixes devices"
        result = func(*args, **(kwargs or {}))
        if on_device and name in ("aten::_to_copy", "aten::copy_"):
            assert result.is_meta, "a device's tensor is read"
        return result


@pytest.mark.parametrize("kind", [*KINDS, "mixtral"])
@pytest.mark.parametrize(
    ("recompute", "in_4bit"), [(False, False), (True, False), (True, True)], ids=["kept", "recomputed", "4 bits"]
)
def test_a_step_reads_nothing_back(kind: str, recompute: bool, in_4bit: bool, make_training: MakeTraining) -> None:
    """Tensors on PyTorch's meta device have no values, so nothing can depend on them."""
    name, more = KINDS.get(kind, ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}))
    chats = [*branching_chats(2, 5, system=12, longest=20), *chats_of(2, 3, 12, 150)]
    dropout = 0.1 if recompute else 0.0
    targets = ["all-experts"] if kind == "mixtral" else []
    job = make_training(name, chats=chats, **more).job(
        dtype="bf16", lora_dropout=dropout, load_in_4bit=in_4bit, target_parameters=targets
    )
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    operations = DeviceOperations(lambda device, dtype, width, limits: PlainKernel() if limits.cap else FlashKernel())
    model = PackedModel(job, "meta", operations)
    model._recomputes = lambda packed: recompute  # type: ignore[method-assign]
    assert model.decoder.embedding.is_meta == (not in_4bit or model.decoder.head._weight is model.decoder.embedding)  # type: ignore[attr-defined]
    with _OnDevice() as watch:
        for group in model.groups(tokens, range(len(tokens))):
            assert model.backward(tokens, group, 0.5).is_meta
            assert model.loss(tokens, group).is_meta
        model.updated()
    assert "aten::_flash_attention_backward" in watch.names or kind == "gemma 2"


def test_a_training_step_is_read_once(make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and norm of the gradient are read together, after all groups."""
    job = make_training(chats=chats_of(2, 6, 12, 40)).job(batch_size=6)
    monkeypatch.setattr(trainers, "best_device", lambda: "meta")
    monkeypatch.setattr(
        trainers, "open_model", lambda job, device, _: PackedModel(job, device, DeviceOperations(_plain))
    )
    trainer = trainers.Trainer(job)
    trainer.state.halvings = [0, 0]
    read: list[torch.Size] = []
    to_list = torch.Tensor.tolist

    def reads(tensor: torch.Tensor) -> list[Any]:
        if not tensor.is_meta:
            return to_list(tensor)
        read.append(tensor.shape)
        return [1.5, 2.0]

    monkeypatch.setattr(torch.Tensor, "tolist", reads)
    with _OnDevice():
        assert trainer.step(range(6), 1e-3) == 1.5
    assert len(trainer.model.groups(trainer.tokens, range(6))) > 2
    assert read == [torch.Size([2])]


def _plain(*_: object) -> PlainKernel:
    return PlainKernel()
