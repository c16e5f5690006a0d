"""The settings that the converter gets, and layers for drafts that the files lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kolotune.gguf.converter_settings import give_file_settings, leave_out_missing_drafts, read_settings


def settings_of(folder: Path, file: dict[str, Any], read: dict[str, Any]) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(file), encoding="utf-8")
    return read_settings(folder, lambda: read)


def test_what_transformers_leaves_out_is_put_back(tmp_path: Path) -> None:
    file = {"rotary_pct": 0.5, "hidden_size": 64, "text_config": {"old": 1, "same": 2}}
    read = {"hidden_size": 32, "new": True, "text_config": {"same": 3}}
    assert settings_of(tmp_path, file, read) == {
        "rotary_pct": 0.5,
        "hidden_size": 32,
        "new": True,
        "text_config": {"old": 1, "same": 3},
    }


@pytest.mark.parametrize(
    ("saved", "name", "value"),
    [
        ({"model_type": "gpt_neox", "rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary_pct", 0.5),
        ({"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1.0}}, "rotary_pct", 0.25),
        ({"model_type": "gpt_neox", "rotary_pct": 0.75}, "rotary_pct", 0.75),
        ({"model_type": "gpt2", "n_positions": 128}, "n_ctx", 128),
        ({"model_type": "gpt2", "n_positions": 128, "n_ctx": 64}, "n_ctx", 64),
        ({"model_type": "cohere2"}, "rotary_pct", 1.0),
        ({"model_type": "deepseek_v3"}, "scoring_func", "sigmoid"),
        ({"model_type": "deepseek_v32"}, "scoring_func", "sigmoid"),
        ({"model_type": "exaone_moe"}, "scoring_func", "sigmoid"),
        ({"model_type": "dots1"}, "scoring_func", "sigmoid"),
        (
            {"model_type": "minimax_m2", "head_dim": 128, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "rotary_dim",
            64,
        ),
        ({"model_type": "minimax_m2", "head_dim": 128, "rotary_dim": 32}, "rotary_dim", 32),
        ({"model_type": "solar_open"}, "partial_rotary_factor", 1.0),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else str(value),
)
def test_what_transformers_5_does_not_save_is_computed(
    tmp_path: Path, saved: dict[str, Any], name: str, value: object
) -> None:
    assert settings_of(tmp_path, saved, dict(saved))[name] == value


def test_the_converter_reads_by_it(tmp_path: Path) -> None:
    class ModelBase:
        @staticmethod
        def load_hparams(dir_model: Path, is_mistral_format: bool) -> dict[str, Any]:
            return {"model_type": "gpt2", "n_positions": 7, "mistral": is_mistral_format}

    (tmp_path / "config.json").write_text('{"extra": 1}', encoding="utf-8")
    give_file_settings(ModelBase)
    assert ModelBase.load_hparams(tmp_path, False)["n_ctx"] == 7
    assert ModelBase.load_hparams(tmp_path, is_mistral_format=False)["extra"] == 1
    assert "extra" not in ModelBase.load_hparams(tmp_path, is_mistral_format=True)


@pytest.mark.parametrize(
    ("tensor", "left_out"),
    [("model.layers.0.mlp.up_proj.weight", True), ("mtp.fc.weight", False), ("model.layers.9.eh_proj.weight", False)],
)
def test_drafts_are_left_out_where_there_are_none(tmp_path: Path, tensor: str, left_out: bool) -> None:
    from safetensors.numpy import save_file

    save_file({tensor: np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")

    class Drafting:
        supports_mtp_export = True
        no_mtp = False

    class Plain:
        supports_mtp_export = False
        no_mtp = False

    for model_class in (Drafting, Plain):
        leave_out_missing_drafts(model_class, tmp_path)
    assert Drafting.no_mtp == left_out and not Plain.no_mtp
