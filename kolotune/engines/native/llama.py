"""Reads model folders of the families that the decoder computes as a `Decoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kolotune.weights.model_config import read_model_config
from kolotune.weights.torch_tensors import TensorFiles
from kolotune.weights.weight_files import weight_files

from . import lora
from .architecture import Activation, Architecture, AttentionPattern, read_architecture
from .attention import Heads
from .attention_limits import Limits
from .decoder import AttentionSetting, Decoder, Factors, Layer
from .families import Norms
from .fused_linear import FusedLinear
from .lora import LoraPair
from .nf4 import Nf4Product
from .operations import LogitScaling, Norm, Operations
from .rotary_frequencies import frequencies

_CPU = torch.device("cpu")
_OUT, _DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)
_LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "out": _OUT,
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"), "down": _DOWN,
}  # fmt: skip
_FUSED_LINEARS = {"out": _OUT, "qkv": ("self_attn.qkv_proj",), "gate_up": ("mlp.gate_up_proj",), "down": _DOWN}
"""A layer's linear layers by their names in the files, in the order of transformers' modules."""
_NORMS = {
    Norms.BEFORE: {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    Norms.AFTER: {
        "attention_norm_after": "post_attention_layernorm", "mlp_norm_after": "post_feedforward_layernorm",
    },
    Norms.AROUND: {
        "attention_norm": "input_layernorm", "attention_norm_after": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm", "mlp_norm_after": "post_feedforward_layernorm",
    },
}  # fmt: skip


def load(
    folder: Path,
    operations: Operations,
    dtype: torch.dtype,
    rank: int,
    scale: float,
    dropout: float,
    targets: Sequence[str],
    device: torch.device = _CPU,
    in_4bit: bool = False,
) -> tuple[Decoder, dict[str, LoraPair]]:
    """Load a model's decoder, and create adapters by the full names of their layers, in the model's order.

    Args:
        folder: a model that `supported_models` supports.
        operations: computes the elementwise parts.
        dtype: of the frozen weights and of the arithmetic.
        rank, scale, dropout: see `LoraPair`.
        targets: see `lora.target_leaves`.
        device: of the frozen weights; the adapters are created on the CPU.
        in_4bit: whether the linear layers' weights are kept in 4 bits.

    Raises:
        ConfigError: a target is not a linear layer.
        ArtifactError: a weight is missing or damaged.
    """
    config = read_model_config(folder)
    architecture = read_architecture(config)
    linears = _FUSED_LINEARS if architecture.family.is_fused else _LINEARS
    chosen = lora.target_leaves({name.rpartition(".")[2] for names in linears.values() for name in names}, targets)

    def pair(name: str, outputs: int, inputs: int) -> LoraPair | None:
        return LoraPair(inputs, outputs, rank, scale, dropout) if name.rpartition(".")[2] in chosen else None

    parts = _Parts(TensorFiles(weight_files(folder)), device, dtype, operations, architecture, pair, in_4bit)
    patterns = architecture.patterns
    layers = [
        parts.layer(f"model.layers.{index}", linears, patterns.index(pattern))
        for index, pattern in enumerate(architecture.layers)
    ]
    embedding = parts.read("model.embed_tokens.weight")
    head = parts.read("lm_head.weight") if "lm_head.weight" in parts.files else embedding
    decoder = Decoder(
        heads=Heads(architecture.queries, architecture.keys, architecture.head_width),
        settings=[_setting(architecture, pattern, device) for pattern in patterns],
        layers=layers,
        activation=Activation(architecture.activation),
        factors=_factors(architecture, dtype),
        embedding=embedding,
        head=operations.product(head, head.shape[1]),
        norm=parts.norm("model.norm"),
        operations=operations,
    )
    return decoder, parts.adapters


def _setting(architecture: Architecture, pattern: AttentionPattern, device: torch.device) -> AttentionSetting:
    limits = Limits(pattern.window, architecture.score_cap)
    scale: float = architecture.score_scale**0.5
    if pattern.rotary is None:
        return AttentionSetting(limits, torch.empty(0, device=device), 1.0, scale)
    rotated = int(architecture.head_width * architecture.rotated_share)
    turning, factor = frequencies(pattern.rotary, rotated)
    return AttentionSetting(limits, turning.to(device), factor, scale)


def _factors(architecture: Architecture, dtype: torch.dtype) -> Factors:
    embeddings = architecture.embedding_factor
    if architecture.family.scales_embeddings:
        embeddings = float(torch.tensor(embeddings).to(dtype))  # as Gemma was trained
    logits = LogitScaling(architecture.logit_factor, architecture.logit_cap)
    return Factors(embeddings, architecture.block_factor, logits)


@dataclass
class _Parts:
    """Reads the parts of a decoder from a model's files, and collects their new adapters by name."""

    files: TensorFiles
    device: torch.device
    dtype: torch.dtype
    operations: Operations
    architecture: Architecture
    pair: Callable[[str, int, int], LoraPair | None]
    in_4bit: bool = False
    adapters: dict[str, LoraPair] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Read a tensor as a copy: a mapped tensor would keep the whole file in memory."""
        return self.files.read(name).to(self.device, self.dtype, copy=True)

    def norm(self, name: str) -> Norm:
        return Norm(self.read(f"{name}.weight"), self.architecture.epsilon, self.architecture.family.norms_stored_less)

    def fused(self, prefix: str, names: Sequence[str]) -> FusedLinear:
        """Read several linear layers as one."""
        full = [f"{prefix}.{name}" for name in names]
        weights = [self.read(f"{name}.weight") for name in full]
        biases = [self.read(f"{name}.bias") if f"{name}.bias" in self.files else None for name in full]
        pairs = [self.pair(name, *weight.shape) for name, weight in zip(full, weights, strict=True)]
        self.adapters |= {name: pair for name, pair in zip(full, pairs, strict=True) if pair is not None}
        return FusedLinear(self.operations, weights, biases, pairs, Nf4Product if self.in_4bit else None)

    def layer(self, prefix: str, linears: Mapping[str, Sequence[str]], setting: int) -> Layer:
        """Read a layer; its linear layers get their adapters in the order of `linears`."""
        fused = {part: self.fused(prefix, names) for part, names in linears.items()}
        norms = {part: self.norm(f"{prefix}.{name}") for part, name in _NORMS[self.architecture.family.norms].items()}
        heads_normed = f"{prefix}.self_attn.q_norm.weight" in self.files
        return Layer(
            setting=setting,
            qkv=fused["qkv"],
            out=fused["out"],
            gate_up=fused["gate_up"],
            down=fused["down"],
            attention_norm=norms.get("attention_norm"),
            attention_norm_after=norms.get("attention_norm_after"),
            mlp_norm=norms.get("mlp_norm"),
            mlp_norm_after=norms.get("mlp_norm_after"),
            query_norm=self.norm(f"{prefix}.self_attn.q_norm") if heads_normed else None,
            key_norm=self.norm(f"{prefix}.self_attn.k_norm") if heads_normed else None,
        )
