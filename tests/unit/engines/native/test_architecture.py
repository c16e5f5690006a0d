"""What is read of ``config.json`` is what transformers reads of it, in every layout that the file had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kolotune.engines.native.architecture import Architecture, read_architecture
from kolotune.engines.native.rotary_frequencies import frequencies
from kolotune.engines.native.rotary_settings import FULL, SLIDING
from kolotune.weights.model_config import read_model_config

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 96, "num_key_value_heads": 2}
SMALL = {**SHAPE, "num_hidden_layers": 8}
YARN = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0, "type": "yarn"}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0], "long_factor": [9.0] * 6, "type": "longrope"}
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FILES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    "linear": {"model_type": "llama", **SMALL, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", **SMALL, "head_dim": 32},
    "qwen 2": {"model_type": "qwen2", **SMALL, "sliding_window": 32, "use_sliding_window": False},
    "qwen 2 with windows": {
        "model_type": "qwen2", **SMALL, "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3,
    },
    "qwen 3 with yarn": {"model_type": "qwen3", **SMALL, "head_dim": 32, "rope_theta": 1e6, "rope_scaling": YARN},
    "qwen 3 with experts": {"model_type": "qwen3_moe", **SMALL, "head_dim": 32, "norm_topk_prob": True},
    "mixtral": {"model_type": "mixtral", **SMALL, "num_experts_per_tok": 3, "sliding_window": 32},
    "gemma": {"model_type": "gemma", **SMALL, "hidden_act": "gelu", "hidden_activation": None, "head_dim": 32},
    "gemma 2": {"model_type": "gemma2", **SMALL, "query_pre_attn_scalar": 144},
    "gemma 3": {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 8, "vocab_size": 96,
        "sliding_window": 32, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "gemma 3 with a pattern": {
        "model_type": "gemma3_text", **SMALL, "sliding_window_pattern": 3, "rope_local_base_freq": 500,
        "rope_theta": 2e5,
    },
    "phi 3": {"model_type": "phi3", **SMALL, "sliding_window": 32, "rope_theta": 5e3},
    "phi 4 mini": {
        "model_type": "phi3", **SMALL, "rope_scaling": LONG, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64, "max_position_embeddings": 1024,
    },
    "smollm 3": {"model_type": "smollm3", **SMALL, "no_rope_layers": [1, 1, 0, 1, 1, 0, 1, 0]},
    "smollm 3 with windows": {
        "model_type": "smollm3", **SMALL, "use_sliding_window": True, "sliding_window": 32,
    },
    "granite": {
        "model_type": "granite", **SMALL, "attention_multiplier": 0.0078125, "logits_scaling": 8.0,
        "residual_multiplier": 0.22, "embedding_multiplier": 12.0,
    },
    "olmo 2": {"model_type": "olmo2", **SMALL, "rope_theta": 5e5},
    "olmo 3": {
        "model_type": "olmo3", **SMALL, "rope_scaling": {**YARN, "rope_type": "yarn", "attention_factor": 1.2},
        "sliding_window": 8,
    },
    "exaone 4": {"model_type": "exaone4", **SMALL, "sliding_window": 32, "sliding_window_pattern": 4},
    "exaone 4 without windows": {"model_type": "exaone4", **SMALL, "sliding_window": None, "layer_types": [FULL] * 8},
}  # fmt: skip


def read(folder: Path, values: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return read_architecture(read_model_config(folder))


@pytest.mark.parametrize("saved_again", [False, True], ids=["older", "saved again"])
@pytest.mark.parametrize("name", FILES)
def test_transformers_reads_the_same(name: str, saved_again: bool, tmp_path: Path) -> None:
    from transformers import AutoConfig

    found = read(tmp_path, FILES[name])
    config: Any = AutoConfig.from_pretrained(tmp_path)
    if saved_again:
        config.save_pretrained(tmp_path)
        found = read_architecture(read_model_config(tmp_path))
    assert (found.queries, found.keys) == (config.num_attention_heads, config.num_key_value_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert found.head_width == width and found.epsilon == config.rms_norm_eps
    assert found.activation == (getattr(config, "hidden_activation", None) or config.hidden_act)
    window = config.sliding_window if hasattr(config, "sliding_window") else None
    listed = getattr(config, "layer_types", None)
    slides = [each == SLIDING for each in listed] if listed else [True] * config.num_hidden_layers
    assert [layer.window for layer in found.layers] == [window if each else None for each in slides]
    assert found.chosen_experts == (getattr(config, "num_experts_per_tok", None) or 0)
    if found.chosen_experts:
        assert found.normalizes_experts == getattr(config, "norm_topk_prob", True)
    assert found.score_cap == (getattr(config, "attn_logit_softcapping", None) or 0.0)
    assert found.logit_cap == (getattr(config, "final_logit_softcapping", None) or 0.0)


@pytest.mark.parametrize("name", FILES)
def test_positions_are_turned_as_in_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    found = read(tmp_path, FILES[name])
    config: Any = AutoConfig.from_pretrained(
        tmp_path, intermediate_size=96, tie_word_embeddings=True, pad_token_id=None
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    embedding = model.model.rotary_emb
    for index, pattern in enumerate(found.layers):
        attention = model.model.layers[index].self_attn
        assert found.score_scale == pytest.approx(attention.scaling)
        turns = getattr(attention, "use_rope", True)
        if config.model_type == "exaone4":
            turns = attention.is_sliding or attention.sliding_window is None
        assert (pattern.rotary is not None) == bool(turns)
        if pattern.rotary is None:
            continue
        kind = f"{SLIDING if pattern.window else FULL}_" if hasattr(embedding, f"{FULL}_inv_freq") else ""
        angles, factor = frequencies(pattern.rotary, int(found.head_width * found.rotated_share))
        torch.testing.assert_close(angles, getattr(embedding, f"{kind}inv_freq"))
        assert factor == pytest.approx(getattr(embedding, f"{kind}attention_scaling"))
