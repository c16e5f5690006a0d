"""Each family's losses and gradients are those of transformers, with everything in which it differs from Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed_models import chats_of, check_recomputing, compare, gradients, pair_of
from support.training import branching_chats

from kolotune.engines.native import sequence_packing
from kolotune.engines.native.families import FAMILIES
from kolotune.engines.native.model import PackedModel, open_model
from kolotune.engines.native.sequence_packing import pack
from kolotune.engines.prepared_tokens import PreparedTokens

MakeTraining = Callable[..., Any]
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32,
    "beta_fast": 8.0, "beta_slow": 1.0,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [9.0] * 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 9}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 9, "layer_types": [SLIDING, FULL]}),
    "qwen 2": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen 3": ("qwen3", {"rope_parameters": YARN}),
    "gemma": ("gemma", {"hidden_act": "gelu"}),
    "gemma 2": (
        "gemma2",
        {
            "sliding_window": 9, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma 3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3, "sliding_window": 9, "layer_types": [SLIDING, FULL, SLIDING],
            "query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 100.0},
                FULL: {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
            },
        },
    ),
    "phi 3": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 9, "num_key_value_heads": 2}),
    "phi 4 mini": (
        "phi3", {"partial_rotary_factor": 0.5, "rope_parameters": LONG, "original_max_position_embeddings": 256},
    ),
    "smollm 3": (
        "smollm3",
        {"num_hidden_layers": 3, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 1.7, "attention_multiplier": 0.3, "residual_multiplier": 0.6,
            "logits_scaling": 2.5,
        },
    ),
    "olmo 2": ("olmo2", {}),
    "olmo 3": (
        "olmo3",
        {
            "sliding_window": 9, "layer_types": [SLIDING, FULL],
            "rope_parameters": {SLIDING: {"rope_type": "default", "rope_theta": 1e4}, FULL: YARN},
        },
    ),
    "exaone 4": ("exaone4", {"sliding_window": 9, "layer_types": [SLIDING, FULL]}),
}  # fmt: skip


def test_every_family_is_compared() -> None:
    """Those with experts are compared in `test_experts`."""
    experts = {kind for kind, family in FAMILIES.items() if family.experts is not None}
    assert {kind for kind, _ in MODELS.values()} | {"llama"} | experts == set(FAMILIES)


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_equal_those_of_transformers(
    kind: str, make_training: MakeTraining, compiled: bool
) -> None:
    """Compare chats of several lengths behind a prefix that they share; windows are shorter than most of them."""
    name, more = MODELS[kind]
    job = make_training(name, chats=chats_of(1, 6, 12, 30), **more).job(compile=compiled)
    assert isinstance(open_model(job, "cpu", 100), PackedModel)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    assert pack(tokens, range(6), share=True).prefix >= 12
    models = pair_of(job)
    compare(job, *models)
    compare(job, *models, share=False)


@pytest.mark.parametrize("kind", MODELS)
def test_long_chats_and_branches(
    kind: str, make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Compare sequences that leave others in the middle, some of them beyond what counts as long."""
    name, more = MODELS[kind]
    chats = [*branching_chats(2, 5, system=12, longest=20), *chats_of(2, 2, 12, 150)]
    monkeypatch.setattr(sequence_packing, "LONG", 40)
    job = make_training(name, chats=chats, **more).job(compile=compiled)
    compare(job, *pair_of(job))


@pytest.mark.parametrize("kind", MODELS)
def test_bf16_stays_near_fp32(kind: str, make_training: MakeTraining, compiled: bool) -> None:
    name, more = MODELS[kind]
    folder = make_training(name, chats=chats_of(6, 6, 12, 40), initializer_range=0.1, **more)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    exact, rough = (pair_of(folder.job(dtype=dtype, compile=compiled))[0] for dtype in ("fp32", "bf16"))
    wanted, found = (gradients(model, tokens, range(6), 0.1) for model in (exact, rough))
    assert found[0] == pytest.approx(wanted[0], rel=0.02)
    whole, near = (torch.cat([each.flatten() for each in each[1].values()]) for each in (wanted, found))
    assert float(torch.cosine_similarity(whole, near, 0)) > 0.99


def test_recomputing_activations_changes_no_bit(make_training: MakeTraining, compiled: bool) -> None:
    """Compare a family with norms around its blocks, windows and caps."""
    name, more = MODELS["gemma 2"]
    job = make_training(name, chats=chats_of(5, 6, 12, 40), **more).job(compile=compiled, lora_dropout=0.4)
    check_recomputing(job)


def test_an_adapter_on_a_fused_matrix_is_one(make_training: MakeTraining) -> None:
    model = PackedModel(make_training("phi3").job(target_modules=["qkv_proj"]))
    assert list(model.adapters) == [f"model.layers.{layer}.self_attn.qkv_proj" for layer in range(2)]
    assert {pair.lora_B.shape for pair in model.adapters.values()} == {(64 + 2 * 32, 4)}
