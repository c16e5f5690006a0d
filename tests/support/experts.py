"""Tiny random models with experts, of each family whose experts are trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .training import TrainingFolder, random_chats, write_tokens

_COMMON: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
}  # fmt: skip
_LATENT = {
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16, "num_key_value_heads": 4, "n_shared_experts": 1,
}  # fmt: skip
EXPERT_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {},
    "qwen3_moe": {"head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "granitemoe": {"initializer_range": 0.1},
    # llama.cpp rounds the range of YaRN, so it is left out.
    "gpt_oss": {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
}
"""The settings of each family, besides those that all share."""


def expert_training(root: Path, family: str, tiny_model: Callable[..., Any], **settings: Any) -> TrainingFolder:
    """Make a folder with a base of 2 layers of 4 experts, two of which compute a token, and six chats."""
    tiny_model(family, root / "base", **{**_COMMON, **EXPERT_FAMILIES[family], **settings})
    config = root / "base" / "config.json"
    if family == "deepseek_v3":  # transformers 5 does not write what the hub's files have
        values = {**json.loads(config.read_text(encoding="utf-8")), "scoring_func": "sigmoid"}
        config.write_text(json.dumps(values), encoding="utf-8")
    write_tokens(root / "data" / "train.safetensors", random_chats(6, 1))
    return TrainingFolder(root)
