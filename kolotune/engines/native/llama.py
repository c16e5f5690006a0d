"""Models of the Llama family as a `Decoder`: which ones it computes, and how their folders are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    config = _config(folder)
    chosen = lora.targeted({name.rpartition(".")[2] for name in _LINEAR}, targets)

    def pair(name: str, outputs: int, inputs: int) -> LoraPair | None:
        return LoraPair(inputs, outputs, rank, alpha, dropout) if name.rpartition(".")[2] in chosen else None

    parts = _Parts(TensorFiles(weight_files(folder)), dtype, operations, float(config.get("rms_norm_eps", 1e-6)), pair)
    layers = [parts.layer(f"model.layers.{index}") for index in range(int(config["num_hidden_layers"]))]
    embedding = parts.read("model.embed_tokens.weight")
    head = parts.read("lm_head.weight") if "lm_head.weight" in parts.files else embedding
    product, heads = operations.product(head, head.shape[1]), _heads(config)
    turns = frequencies(config, heads.width)
    decoder = Decoder(heads, layers, embedding, product, parts.norm("model.norm"), turns, operations)
    return decoder, parts.adapters


@dataclass
class _Parts:
    """Makes the parts of a decoder from a model's files, and keeps the adapters it made, by name."""

    files: TensorFiles
    dtype: torch.dtype
    operations: Operations
    epsilon: float
    pair: Callable[[str, int, int], LoraPair | None]
    adapters: dict[str, LoraPair] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """A tensor of its own: what stays mapped would hold the whole file in memory."""
        return self.files.read(name).to(self.dtype, copy=True)

    def norm(self, name: str) -> Norm:
        return Norm(self.read(f"{name}.weight"), self.epsilon)

    def fused(self, prefix: str, names: Sequence[str]) -> FusedLinear:
        """The linear layers of these names as one."""
        full = [f"{prefix}.{name}" for name in names]
        weights = [self.read(f"{name}.weight") for name in full]
        biases = [self.read(f"{name}.bias") if f"{name}.bias" in self.files else None for name in full]
        pairs = [self.pair(name, *weight.shape) for name, weight in zip(full, weights, strict=True)]
        self.adapters |= {name: pair for name, pair in zip(full, pairs, strict=True) if pair is not None}
        return FusedLinear(self.operations, weights, biases, pairs)

    def layer(self, prefix: str) -> Layer:
        by_head = f"{prefix}.self_attn.q_norm.weight" in self.files
        return Layer(
            attention_norm=self.norm(f"{prefix}.input_layernorm"),
            qkv=self.fused(prefix, _QKV),
            out=self.fused(prefix, _OUT),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm"),
            gate_up=self.fused(prefix, _GATE_UP),
            down=self.fused(prefix, _DOWN),
            query_norm=self.norm(f"{prefix}.self_attn.q_norm") if by_head else None,
            key_norm=self.norm(f"{prefix}.self_attn.k_norm") if by_head else None,
        )


def _heads(config: dict[str, Any]) -> Heads:
    queries = int(config["num_attention_heads"])
    width = config.get("head_dim") or int(config["hidden_size"]) // queries
    return Heads(queries, int(config.get("num_key_value_heads") or queries), int(width))
