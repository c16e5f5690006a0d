"""Models of the Llama family as a `Decoder`: which ones it computes, and how their folders are read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...weights import TensorFiles, weight_files
from . import lora
from .attention import Heads
from .decoder import Decoder, Layer
from .fused import FusedLinear
from .lora import LoraPair
from .operations import Norm, Operations

# What a config may hold without changing what is computed; a key that stands nowhere here is one we don't know.
_KNOWN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_QKV, _OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)
_GATE_UP, _DOWN = ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
_LINEAR = (*_QKV, *_OUT, *_GATE_UP, *_DOWN)


def why_not(folder: Path, longest: int) -> str:
    """Why the decoder can't compute a model; "" when it can.

    Args:
        folder: of the model.
        longest: tokens of the longest chat.
    """
    config = _config(folder)
    kind = config.get("model_type")
    if kind not in _KNOWN_TYPES:
        return f"its architecture is {kind}"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']}"
    if _rotary(config).get("rope_type", "default") not in ("default", "llama3", "linear"):
        return f"its rotary embedding is {_rotary(config)['rope_type']}"
    if config.get("partial_rotary_factor", 1.0) != 1.0 or config.get("pretraining_tp", 1) != 1:
        return "it turns a part of each head only"
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        return "some of its layers see a window only"
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", kind == "mistral") and window < longest:
        return f"its layers see a window of {window} tokens"
    return ""


def _config(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return loaded


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings; older configs keep them in two places, and call the type by another name."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if "rope_type" not in found and "type" in found:
        found["rope_type"] = found["type"]
    return found


def frequencies(config: dict[str, Any], width: int) -> Tensor:
    """Angles per position, fp32 ``[width / 2]``.

    Sources: Su et al., "RoFormer", 2021; for "llama3" the scaling that Llama 3.1 was released with: long waves are
    stretched by `factor`, short ones kept, and those between are blended.
    """
    rotary = _rotary(config)
    plain: Tensor = 1.0 / rotary["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    if rotary.get("rope_type") == "linear":
        return plain / float(rotary["factor"])
    if rotary.get("rope_type") != "llama3":
        return plain
    factor, low, high = (float(rotary[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rotary["original_max_position_embeddings"] * plain / (2 * math.pi)
    blend: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def load(
    folder: Path,
    operations: Operations,
    dtype: torch.dtype,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
) -> tuple[Decoder, dict[str, LoraPair]]:
    """A model's decoder, and its new adapters by the full names of their layers, in the model's order.

    Args:
        folder: a model for which `why_not` says nothing.
        operations: how its elementwise parts are computed.
        dtype: of the frozen weights and of the arithmetic.
        rank, alpha, dropout: see `LoraPair`.
        targets: see `lora.targeted`.

    Raises:
        ConfigError: a target is no linear layer.
        ArtifactError: a weight is missing or damaged.
    """
    config, files = _config(folder), TensorFiles(weight_files(folder))
    heads = _heads(config)
    chosen = lora.targeted({name.rpartition(".")[2] for name in _LINEAR}, targets)
    adapters: dict[str, LoraPair] = {}

    def read(name: str) -> Tensor:
        return files.read(name).to(dtype, copy=True)  # what stays mapped would hold the whole file in memory

    def fused(prefix: str, names: Sequence[str]) -> FusedLinear:
        weights = [read(f"{prefix}.{name}.weight") for name in names]
        biases = [read(f"{prefix}.{name}.bias") if f"{prefix}.{name}.bias" in files else None for name in names]
        pairs: list[LoraPair | None] = []
        for name, weight in zip(names, weights, strict=True):
            pair = None
            if name.rpartition(".")[2] in chosen:
                pair = LoraPair(weight.shape[1], weight.shape[0], rank, alpha, dropout)
                adapters[f"{prefix}.{name}"] = pair
            pairs.append(pair)
        return FusedLinear(operations, weights, biases, pairs)

    def norm(name: str) -> Norm:
        return Norm(read(f"{name}.weight"), float(config.get("rms_norm_eps", 1e-6)))

    layers = []
    for index in range(int(config["num_hidden_layers"])):
        prefix = f"model.layers.{index}"
        by_head = f"{prefix}.self_attn.q_norm.weight" in files
        layers.append(
            Layer(
                attention_norm=norm(f"{prefix}.input_layernorm"),
                qkv=fused(prefix, _QKV),
                out=fused(prefix, _OUT),
                mlp_norm=norm(f"{prefix}.post_attention_layernorm"),
                gate_up=fused(prefix, _GATE_UP),
                down=fused(prefix, _DOWN),
                query_norm=norm(f"{prefix}.self_attn.q_norm") if by_head else None,
                key_norm=norm(f"{prefix}.self_attn.k_norm") if by_head else None,
            )
        )
    embedding = read("model.embed_tokens.weight")
    head = read("lm_head.weight") if "lm_head.weight" in files else embedding
    product = operations.product(head, head.shape[1])
    turns = frequencies(config, heads.width)
    return Decoder(heads, layers, embedding, product, norm("model.norm"), turns, operations), adapters


def _heads(config: dict[str, Any]) -> Heads:
    queries = int(config["num_attention_heads"])
    width = config.get("head_dim") or int(config["hidden_size"]) // queries
    return Heads(queries, int(config.get("num_key_value_heads") or queries), int(width))
