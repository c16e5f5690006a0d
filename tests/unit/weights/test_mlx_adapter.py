"""Adapters in mlx-lm's format give the same model as the same update in PEFT's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kolotune.base_models.adapter_base import base_of
from kolotune.foundation.errors import ArtifactError, ConfigError, ModelError
from kolotune.foundation.reporter import PlainReporter
from kolotune.stages import merge
from kolotune.weights.adapter import read_adapter

LAYER = "model.layers.0.self_attn.q_proj"
SETTINGS = {"rank": 2, "scale": 20.0, "dropout": 0.0}


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write an adapter as mlx_lm.lora does."""
    folder.mkdir(exist_ok=True)
    values = {"fine_tune_type": "lora", "model": "owner/name", "num_layers": 16, "lora_parameters": SETTINGS, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors, folder / "adapters.safetensors")
    return folder


def merged(root: Path) -> dict[str, torch.Tensor]:
    (root / "merged").mkdir()
    merge.merge_adapter(
        root / "adapter",
        root / "base",
        root / "merged",
        tokenizer=root / "base",
        dtype="fp32",
        reporter=PlainReporter(),
    )
    return load_file(root / "merged" / "model.safetensors")


def pair(inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(inputs, 2), torch.randn(2, outputs)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("module", [LAYER, "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"])
def test_linear_layers_and_embeddings(module: str, kind: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    tiny_model("llama", tmp_path / "base")
    weight = load_file(tmp_path / "base" / "model.safetensors")[f"{module}.weight"]
    embeds = module == "model.embed_tokens"
    a, b = pair(*(weight.shape if embeds else weight.shape[::-1]))
    expected = weight + 20.0 * (a @ b if embeds else (a @ b).T)
    tensors = {f"{module}.lora_a": a, f"{module}.lora_b": b}
    if kind == "dora":
        tensors[f"{module}.m"] = torch.rand(len(weight)) + 1
        expected = expected * (tensors[f"{module}.m"] / expected.norm(dim=1))[:, None]
    write(tmp_path / "adapter", tensors, fine_tune_type=kind)
    result = merged(tmp_path)
    torch.testing.assert_close(result[f"{module}.weight"], expected)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert [name for name in base if not torch.equal(base[name], result[name])] == [f"{module}.weight"]


def test_a_tied_embedding_stays_tied(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    tiny_model("llama", tmp_path / "base", tie_word_embeddings=True)
    a, b = pair(96, 64)
    write(tmp_path / "adapter", {"model.embed_tokens.lora_a": a, "model.embed_tokens.lora_b": b})
    assert "lm_head.weight" not in merged(tmp_path)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("family", "module", "names"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.switch_mlp.down_proj", "block_sparse_moe.experts.{}.w2"),
        ("mixtral", "model.layers.0.block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.experts.{}.w3"),
        ("qwen2_moe", "model.layers.0.mlp.switch_mlp.gate_proj", "mlp.experts.{}.gate_proj"),
    ],
)
def test_experts(family: str, module: str, names: str, tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    settings = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    tiny_model(family, tmp_path / "base", **settings)
    base = load_file(tmp_path / "base" / "model.safetensors")
    stored = [f"model.layers.0.{names.format(expert)}.weight" for expert in range(3)]
    outputs, inputs = base[stored[0]].shape
    a, b = torch.randn(3, 2, inputs), torch.randn(3, outputs, 2)
    write(tmp_path / "adapter", {f"{module}.lora_a": a, f"{module}.lora_b": b})
    result = merged(tmp_path)
    for expert, name in enumerate(stored):
        torch.testing.assert_close(result[name], base[name] + 20.0 * b[expert] @ a[expert])
    assert [name for name in base if not torch.equal(base[name], result[name])] == stored


def test_a_model_tuned_whole(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    tiny_model("llama", tmp_path / "base")
    trained = {f"{LAYER}.weight": torch.randn(64, 64), "model.norm.weight": torch.randn(64)}
    write(tmp_path / "adapter", trained, fine_tune_type="full", lora_parameters=None)
    result = merged(tmp_path)
    assert all(torch.equal(result[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"fine_tune_type": "bitfit"}, ModelError, "bitfit"),
        ({"lora_parameters": {"rank": 2}}, ArtifactError, "rank and scale"),
        ({"lora_parameters": {"rank": "2", "scale": 1}}, ArtifactError, "rank and scale"),
        ({"lora_parameters": {"rank": 4, "scale": 1}}, ArtifactError, "its rank is 2, the config says 4"),
    ],
)
def test_refused_configs(config: dict[str, Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    a, b = pair(6, 5)
    with pytest.raises(error, match=words):
        read_adapter(write(tmp_path, {f"{LAYER}.lora_a": a, f"{LAYER}.lora_b": b}, **config))


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({f"{LAYER}.lora_a": torch.ones(6, 2)}, ArtifactError),
        ({f"{LAYER}.lora_a": torch.ones(6, 2), f"{LAYER}.lora_b": torch.ones(3, 5)}, ArtifactError),
        ({f"{LAYER}.lora_a": torch.ones(6, 2), f"{LAYER}.lora_b": torch.ones(2, 5), f"{LAYER}.m": torch.ones(4)},
         ArtifactError),
        ({f"{LAYER}.lora_a": torch.ones(3, 2, 6), f"{LAYER}.lora_b": torch.ones(3, 5, 2)}, ModelError),
        ({f"{LAYER}.lora_a_scales": torch.ones(6, 2)}, ModelError),
        ({}, ArtifactError),
    ],
)  # fmt: skip
def test_refused_tensors(tensors: dict[str, torch.Tensor], error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        read_adapter(write(tmp_path, tensors))


def test_its_base_is_named_under_another_key(tmp_path: Path) -> None:
    a, b = pair(6, 5)
    folder = write(tmp_path, {f"{LAYER}.lora_a": a, f"{LAYER}.lora_b": b})
    assert base_of(folder, None) == "owner/name"
    folder = write(tmp_path, {f"{LAYER}.lora_a": a, f"{LAYER}.lora_b": b}, model="mlx-community/Qwen3-4B-4bit")
    with pytest.raises(ConfigError) as caught:
        base_of(folder, None)
    assert "--base Qwen/Qwen3-4B" in caught.value.hint
