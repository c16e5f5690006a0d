"""Layers with experts on the hand-written step compute the losses and gradients of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packed_models import chats_of, check_recomputing, compare, pair_of
from support.training import branching_chats

from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.experts import DOWN, GATE_UP, Experts
from kolotune.engines.native.families import FAMILIES
from kolotune.engines.native.kernels import build
from kolotune.engines.native.model import PackedModel, open_model
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation.errors import ConfigError

MakeTraining = Callable[..., Any]
COMMON = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN = {**COMMON, "num_experts": 5, "head_dim": 16, "moe_intermediate_size": 48}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**COMMON, "sliding_window": 9}),
    "qwen 3 normalized": ("qwen3_moe", {**QWEN, "norm_topk_prob": True}),
    "qwen 3": ("qwen3_moe", {**QWEN, "norm_topk_prob": False, "mlp_only_layers": [0]}),
}
TARGETS = [["all-experts"], ["experts.down_proj"], []]


def test_every_family_with_experts_is_compared() -> None:
    assert {kind for kind, _ in MODELS.values()} == {kind for kind, family in FAMILIES.items() if family.experts}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("targets", TARGETS, ids=["all", "down", "none"])
def test_losses_and_gradients_equal_those_of_transformers(
    kind: str, targets: list[str], make_training: MakeTraining, compiled: bool
) -> None:
    name, more = MODELS[kind]
    chats = [*branching_chats(2, 5, system=12, longest=20), *chats_of(2, 3, 12, 60)]
    job = make_training(name, chats=chats, **more).job(compile=compiled, target_parameters=targets)
    assert isinstance(open_model(job, "cpu", 100), PackedModel)
    models = pair_of(job)
    compare(job, *models)
    compare(job, *models, share=False)


@pytest.mark.parametrize("kind", MODELS)
def test_the_step_for_gpus_computes_the_same(kind: str, make_training: MakeTraining) -> None:
    name, more = MODELS[kind]
    job = make_training(name, chats=chats_of(2, 5, 12, 60), **more).job(target_parameters=["all-experts"])
    compare(job, *pair_of(job, DeviceOperations()))


def test_files_with_all_experts_in_one(make_training: MakeTraining) -> None:
    """Some files have transformers' own form."""
    folder = make_training("qwen3_moe", chats=chats_of(2, 3, 0, 20), **QWEN)
    file = folder.root / "base" / "model.safetensors"
    apart = PackedModel(folder.job())
    tensors = {name: each for name, each in load_file(file).items() if ".experts." not in name}
    for index, layer in enumerate(apart.decoder.layers):
        for leaf in (GATE_UP, DOWN):
            tensors[f"model.layers.{index}.mlp.experts.{leaf}"] = layer.mlp.weights[leaf].weight  # type: ignore[attr-defined]
    save_file(tensors, file, {"format": "pt"})
    tokens = PreparedTokens.load(Path(folder.job().data) / "train.safetensors")
    assert PackedModel(folder.job()).loss(tokens, range(3)) == apart.loss(tokens, range(3))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputing_activations_changes_no_bit(dropout: float, make_training: MakeTraining, compiled: bool) -> None:
    name, more = MODELS["mixtral"]
    folder = make_training(name, chats=chats_of(5, 6, 12, 40), **more)
    job = folder.job(compile=compiled, lora_dropout=dropout, target_parameters=["all-experts"])
    check_recomputing(job)


def test_dropout_gradients_match_a_finite_difference(make_training: MakeTraining) -> None:
    job = make_training("mixtral", chats=chats_of(5, 3, 0, 20), **COMMON).job(
        lora_dropout=0.3, target_parameters=["all-experts"]
    )
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    model, _ = pair_of(job)
    flat = model.flat.parameter

    def loss() -> float:
        torch.manual_seed(4)
        model.updated()
        return float(model.backward(tokens, range(3), 1.0))

    loss()
    torch.manual_seed(2)
    direction = torch.randn_like(flat)
    assert flat.grad is not None
    slope, step, ends = float((flat.grad * direction).sum()), 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            flat.add_(direction, alpha=sign * step)
        ends.append(loss())
        with torch.no_grad():
            flat.sub_(direction, alpha=sign * step)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_stays_near_fp32(kind: str, make_training: MakeTraining, compiled: bool) -> None:
    name, more = MODELS[kind]
    folder = make_training(name, chats=chats_of(6, 6, 12, 40), initializer_range=0.05, **more)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    exact, rough = (PackedModel(folder.job(dtype=dtype, compile=compiled)) for dtype in ("fp32", "bf16"))
    assert float(rough.loss(tokens, range(6))) == pytest.approx(float(exact.loss(tokens, range(6))), rel=0.02)


def test_a_target_that_no_expert_has_is_refused(make_training: MakeTraining) -> None:
    job = make_training("mixtral", **COMMON).job(target_parameters=["experts.w1"])
    with pytest.raises(ConfigError, match=r"no experts' weight experts\.w1"):
        PackedModel(job)
    with pytest.raises(ConfigError, match="no linear layer gate_proj"):
        PackedModel(make_training("qwen3_moe", **QWEN).job(target_modules=["gate_proj"]))


def test_experts_that_are_published_in_bf16_stay_so(make_training: MakeTraining) -> None:
    """Where the kernels multiply fp32 numbers, they widen them on the way."""
    if not build.multiplies():
        pytest.skip("this processor's products are PyTorch's")
    folder = make_training("qwen3_moe", dtype="bfloat16", **QWEN)
    model = PackedModel(folder.job(compile=True))
    for layer in model.decoder.layers:
        assert isinstance(layer.mlp, Experts)
        assert {each.weight.dtype for each in layer.mlp.weights.values()} == {torch.bfloat16}
