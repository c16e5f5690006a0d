"""Which models the decoder computes, and the reasons of the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kolotune.engines.native.families import FAMILIES
from kolotune.engines.native.supported_models import reason_unsupported

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}


def reason(folder: Path, kind: str, longest: int = 100, **more: Any) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **SMALL, **more}), encoding="utf-8")
    return reason_unsupported(folder, longest)


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_are_supported(kind: str, tmp_path: Path) -> None:
    assert reason(tmp_path, kind) == ""


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("gemma3n_text", {}, "architecture is gemma3n_text"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("gemma2", {"hidden_activation": "gelu"}, "activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "is dynamic"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "is yarn"),
        ("llama", {"partial_rotary_factor": 0.5}, "only a part of each head"),
        ("olmo3", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ("granite", {"attention_dropout": 0.1}, "dropout"),
        ("phi3", {"resid_pdrop": 0.1}, "dropout"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "later tokens"),
    ],
)
def test_settings_outside_of_the_table_have_a_reason(
    kind: str, more: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in reason(tmp_path, kind, **more)


def test_the_switch_leaves_every_model_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOLOTUNE_PACKED_STEP", "off")
    assert "KOLOTUNE_PACKED_STEP" in reason(tmp_path, "llama")


def test_a_rotary_embedding_that_depends_on_the_longest_chat(tmp_path: Path) -> None:
    scaling = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    for longest, expected in ((32, ""), (33, "stretched")):
        found = reason(tmp_path, "phi3", longest, rope_scaling=scaling, original_max_position_embeddings=32)
        assert expected in found and bool(expected) == bool(found)
