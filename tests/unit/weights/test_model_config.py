"""What is read of a model's config.json, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kolotune.foundation.errors import ModelError
from kolotune.weights.model_config import ModelConfig, read_model_config


def config_of(folder: Path, **values: object) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return read_model_config(folder)


def test_a_composite_model_keeps_its_language_model_in_a_section(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    config = config_of(tmp_path, model_type="gemma3", vocab_size=96, text_config=text)
    assert (config.model_type, config.hidden_size, config.head_size) == ("gemma3", 64, 16)
    assert (config.vocabulary_size, config.key_value_heads, config.max_positions) == (96, 4, 512)


def test_gpt2_has_names_of_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path, n_embd=32, n_head=2, n_layer=3)
    assert (config.hidden_size, config.attention_heads, config.layers) == (32, 2, 3)


def test_what_is_missing_or_null_has_a_default(tmp_path: Path) -> None:
    config = config_of(tmp_path, architectures=None, num_key_value_heads=None)
    assert (config.architectures, config.model_type, config.max_positions) == ((), "", None)
    assert not config.ties_embeddings and not config.is_quantized
    assert (config.rotary.kind, config.rotary.theta) == ("default", 10_000.0)


@pytest.mark.parametrize("value", ["big", True, 1.5, [1]])
def test_a_wrong_number_names_file_and_setting(value: object, tmp_path: Path) -> None:
    config = config_of(tmp_path, hidden_size=value)
    with pytest.raises(ModelError, match=r"config\.json: hidden_size"):
        _ = config.hidden_size


def test_a_missing_number_that_is_required(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ModelError, match="vocab_size"):
        config.required_integer("vocab_size")
    with pytest.raises(ModelError, match="rms_norm_eps"):
        config.number("rms_norm_eps")
