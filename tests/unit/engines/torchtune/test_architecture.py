"""Base models that torchtune can represent are accepted; others are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kolotune.engines.torchtune.architecture import CONFIGS, read
from kolotune.foundation.errors import ModelError

# As on the hub, in the format of transformers before version 5.
LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
VERSION_5 = {
    **{name: value for name, value in LLAMA_1B.items() if not name.startswith("rope_")},
    "rope_parameters": {**LLAMA_1B["rope_scaling"], "rope_theta": 500000.0},
}
LLAMA_3B = {**LLAMA_1B, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28, "head_dim": 128}
LLAMA_8B = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": None,
    "rope_scaling": {**LLAMA_1B["rope_scaling"], "factor": 8.0},
    "tie_word_embeddings": False,
}


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA_1B, "llama3_2/1B_qlora_single_device"),
        (VERSION_5, "llama3_2/1B_qlora_single_device"),
        (LLAMA_3B, "llama3_2/3B_qlora_single_device"),
        (LLAMA_8B, "llama3_1/8B_qlora_single_device"),
        ({**LLAMA_1B, "num_hidden_layers": 15}, None),
        ({**LLAMA_1B, "rope_theta": 10000.0}, None),
    ],
)
def test_only_the_exact_shape_gets_torchtunes_own_config(
    config: dict[str, Any], name: str | None, tmp_path: Path
) -> None:
    assert CONFIGS.get(read(write(tmp_path / "any name", config))) == name


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_of_a_model_saved_by_transformers(tied: bool, tiny_model: Any, tmp_path: Path) -> None:
    tiny_model("llama", tmp_path / "model", tie_word_embeddings=tied)
    shape = read(tmp_path / "model")
    assert (shape.vocab_size, shape.embed_dim, shape.intermediate_dim, shape.num_layers) == (96, 64, 96, 2)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (4, 2, 16)
    assert (shape.rope_base, shape.rope_scale, shape.tied) == (10000.0, 1.0, tied)


def test_missing_settings_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    missing = {"num_key_value_heads", "head_dim", "rope_scaling", "tie_word_embeddings"}
    shape = read(write(tmp_path / "old", {name: each for name, each in LLAMA_1B.items() if name not in missing}))
    assert (shape.num_kv_heads, shape.head_dim, shape.rope_scale, shape.tied) == (32, 64, 1.0, False)


SCALING = LLAMA_1B["rope_scaling"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"architectures": None}, "unnamed"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"head_dim": 128}, "128"),
        ({"num_key_value_heads": 7}, "7"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 8.0}}, "high_freq_factor"),
        ({"rope_scaling": {**SCALING, "original_max_position_embeddings": 4096}}, "4096"),
        ({"hidden_size": "big"}, "big"),
        ({"vocab_size": None}, "None"),
    ],
)
def test_what_torchtune_cannot_represent_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {**LLAMA_1B, **change})
    with pytest.raises(ModelError, match="torchtune can't train mine") as raised:
        read(folder)
    assert reason in raised.value.cause
    assert "smollm2-135m" in raised.value.hint and "meta-llama/Llama-3.1-8B-Instruct" in raised.value.hint


def test_a_missing_number_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", {name: value for name, value in LLAMA_1B.items() if name != "rms_norm_eps"})
    with pytest.raises(ModelError, match="rms_norm_eps"):
        read(folder)


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="can't be read"):
        read(tmp_path)
