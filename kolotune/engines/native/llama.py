"""Reads model folders of the Llama family as a `Decoder`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kolotune.weights.model_config import ModelConfig, RotaryEmbedding, read_model_config
from kolotune.weights.torch_tensors import TensorFiles
from kolotune.weights.weight_files import weight_files

from . import lora
from .attention import Heads
from .decoder import Decoder, Layer
from .fused_linear import FusedLinear
from .lora import LoraPair
from .operations import Norm, Operations

_QKV, _OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)
_GATE_UP, _DOWN = ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)
_LINEAR = (*_QKV, *_OUT, *_GATE_UP, *_DOWN)


def frequencies(rotary: RotaryEmbedding, width: int) -> Tensor:
    """Return the angles per position, fp32 ``[width / 2]``.

    Sources: Su et al., "RoFormer", 2021. "llama3" is the scaling of Llama 3.1: long waves are stretched by `factor`,
    short ones kept, and those between are blended.
    """
    plain: Tensor = 1.0 / rotary.theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    if rotary.kind == "linear":
        return plain / rotary.number("factor")
    if rotary.kind != "llama3":
        return plain
    factor, low, high = (rotary.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rotary.number("original_max_position_embeddings") * plain / (2 * math.pi)
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
    """Load a model's decoder, and create adapters by the full names of their layers, in the model's order.

    Args:
        folder: a model that `supported_models` supports.
        operations: computes the elementwise parts.
        dtype: of the frozen weights and of the arithmetic.
        rank, alpha, dropout: see `LoraPair`.
        targets: see `lora.target_leaves`.

    Raises:
        ConfigError: a target is not a linear layer.
        ArtifactError: a weight is missing or damaged.
    """
    config = read_model_config(folder)
    chosen = lora.target_leaves({name.rpartition(".")[2] for name in _LINEAR}, targets)

    def pair(name: str, outputs: int, inputs: int) -> LoraPair | None:
        return LoraPair(inputs, outputs, rank, alpha, dropout) if name.rpartition(".")[2] in chosen else None

    parts = _Parts(TensorFiles(weight_files(folder)), dtype, operations, config.number("rms_norm_eps", 1e-6), pair)
    layers = [parts.layer(f"model.layers.{index}") for index in range(config.required_integer("num_hidden_layers"))]
    embedding = parts.read("model.embed_tokens.weight")
    head = parts.read("lm_head.weight") if "lm_head.weight" in parts.files else embedding
    product, heads = operations.product(head, head.shape[1]), _heads(config)
    turns = frequencies(config.rotary, heads.width)
    decoder = Decoder(heads, layers, embedding, product, parts.norm("model.norm"), turns, operations)
    return decoder, parts.adapters


@dataclass
class _Parts:
    """Reads the parts of a decoder from a model's files, and collects their new adapters by name."""

    files: TensorFiles
    dtype: torch.dtype
    operations: Operations
    epsilon: float
    pair: Callable[[str, int, int], LoraPair | None]
    adapters: dict[str, LoraPair] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Read a tensor as a copy: a mapped tensor would keep the whole file in memory."""
        return self.files.read(name).to(self.dtype, copy=True)

    def norm(self, name: str) -> Norm:
        return Norm(self.read(f"{name}.weight"), self.epsilon)

    def fused(self, prefix: str, names: Sequence[str]) -> FusedLinear:
        """Read several linear layers as one."""
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


def _heads(config: ModelConfig) -> Heads:
    return Heads(config.attention_heads, config.key_value_heads, config.head_size)
