"""Reads model folders of the families that the decoder computes as a `Decoder`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kolotune.weights.initial_matrices import Initial
from kolotune.weights.model_config import read_model_config
from kolotune.weights.stored_blocks import has_blocks
from kolotune.weights.torch_tensors import TensorFiles
from kolotune.weights.weight_files import weight_files

from . import expert_lora, lora
from .architecture import Activation, Architecture, AttentionPattern, read_architecture
from .attention import Heads
from .attention_limits import Limits
from .block_matrix import BlockFiles
from .decoder import AttentionSetting, Decoder, Factors, Layer
from .expert_lora import LoraExpertWeight
from .experts import DOWN, GATE_UP, Experts
from .families import Norms
from .fused_linear import FusedLinear
from .kernels.compiled_operations import CompiledProduct
from .lora import LoraPair
from .lora_settings import LoraSettings
from .matrix_product import Product
from .mlp import DenseMlp
from .nf4 import Nf4Product
from .operations import LogitScaling, Norm, Operations
from .rotary_frequencies import frequencies
from .starting_matrices import start
from .token_rows import NewTokenRows, VocabularyRows

_CPU = torch.device("cpu")
_EMBEDDING_ROWS, _HEAD_ROWS = "model.embed_tokens.token_adapter", "lm_head.token_adapter"
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
    settings: LoraSettings,
    targets: Sequence[str],
    parameters: Sequence[str] = (),
    device: torch.device = _CPU,
    in_4bit: bool = False,
    new_tokens: Sequence[int] = (),
) -> tuple[Decoder, dict[str, LoraPair | LoraExpertWeight | NewTokenRows]]:
    """Load a model's decoder, and create adapters by the full names of their layers, in the model's order.

    Args:
        folder: a model that `supported_models` supports.
        operations: computes the elementwise parts.
        dtype: of the frozen weights and of the arithmetic.
        settings: of the adapters.
        targets: see `lora.target_leaves`.
        parameters: see `expert_lora.add_expert_adapters`.
        device: of the frozen weights; the adapters are created on the CPU.
        in_4bit: whether the linear layers' weights are kept in 4 bits, or in the blocks of the GGUF that the model was
            made from.
        new_tokens: ids, which follow each other, of the tokens whose rows are trained.

    Raises:
        ConfigError: a target is not a linear layer, or no weight of experts.
        ArtifactError: a weight is missing or damaged.
    """
    config = read_model_config(folder)
    architecture = read_architecture(config)
    files = TensorFiles(weight_files(folder))
    names = [name for part in _linears(architecture).values() for name in part]
    present = [name for name in names if any(f"{at}.{name}.weight" in files for at in _prefixes(architecture))]
    chosen = lora.target_leaves({name.rpartition(".")[2] for name in present}, targets)

    def pair(name: str, outputs: int, inputs: int) -> LoraPair | None:
        if name.rpartition(".")[2] not in chosen:
            return None
        sizes = inputs, outputs, settings.rank_of(name)
        return LoraPair(*sizes, settings.scale_of(name), settings.dropout, settings.has_magnitudes)

    blocks = BlockFiles(folder, device) if in_4bit and has_blocks(folder) else None
    parts = _Parts(files, device, dtype, operations, architecture, pair, in_4bit, blocks, settings.initial)
    layers = parts.layers()
    of_experts = _expert_adapters(layers, settings, parameters)
    decoder, rows = parts.decoder(layers, new_tokens)
    return decoder, {**parts.adapters, **of_experts, **rows}


def load_decoder(
    folder: Path,
    operations: Operations,
    dtype: torch.dtype,
    pair: Callable[[str, int, int], LoraPair | None],
    linear: type[FusedLinear],
) -> Decoder:
    """Load a model's decoder on the CPU, with adapters that exist.

    Args:
        folder: a model without experts that `supported_models` supports.
        operations: computes the elementwise parts.
        dtype: of the weights and of the arithmetic.
        pair: returns the adapter of a linear layer, by its full name and its numbers of outputs and inputs.
        linear: what computes linear layers over one input.

    Raises:
        ArtifactError: a weight is missing or damaged.
    """
    files = TensorFiles(weight_files(folder))
    parts = _Parts(files, _CPU, dtype, operations, read_architecture(read_model_config(folder)), pair, linear=linear)
    return parts.decoder(parts.layers(), ())[0]


def _linears(architecture: Architecture) -> Mapping[str, Sequence[str]]:
    return _FUSED_LINEARS if architecture.family.is_fused else _LINEARS


def _prefixes(architecture: Architecture) -> list[str]:
    return [f"model.layers.{index}" for index in range(len(architecture.layers))]


def _expert_adapters(
    layers: Sequence[Layer], settings: LoraSettings, targets: Sequence[str]
) -> dict[str, LoraExpertWeight]:
    """Create the adapters of experts, on the CPU, and give them to the layers; return them by PEFT's names."""
    modules = {
        f"model.layers.{index}.mlp.experts": layer.mlp
        for index, layer in enumerate(layers)
        if isinstance(layer.mlp, Experts)
    }
    expert_lora.check_targets(targets, {f"{name}.{leaf}" for name, mlp in modules.items() for leaf in mlp.weights})
    adapters: dict[str, LoraExpertWeight] = {}
    for name, experts in modules.items():
        weights = {leaf: each.weight.to("meta") for leaf, each in experts.weights.items()}
        updates = expert_lora.new_updates(name, weights, settings, targets)
        for leaf, update in updates.items():
            experts.weights[leaf].update = update
        adapters |= expert_lora.named_as_saved(name, updates)
    return adapters


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
    # transformers scales within the embedding, whose output gets the noise, or behind it.
    noise = 1.0 if architecture.family.scales_embeddings else embeddings
    return Factors(embeddings, architecture.block_factor, logits, noise)


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
    blocks: BlockFiles | None = None
    initial: Initial | None = None
    linear: type[FusedLinear] = FusedLinear
    adapters: dict[str, LoraPair] = field(default_factory=dict)

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        """Read a tensor as a copy: a mapped tensor would keep the whole file in memory."""
        return self.files.copy(name, self.dtype, device or self.device)

    def read_narrow(self, name: str) -> Tensor:
        """Read a frozen matrix, in bf16 if it is stored so and widened when it is multiplied."""
        is_narrow = self.operations.widens and self.files.read(name).dtype == torch.bfloat16
        return self.files.copy(name, torch.bfloat16 if is_narrow else self.dtype, self.device)

    def decoder(self, layers: list[Layer], new_tokens: Sequence[int]) -> tuple[Decoder, dict[str, NewTokenRows]]:
        """Read what is around the layers; return also the rows of new tokens, by PEFT's names."""
        architecture = self.architecture
        is_tied = "lm_head.weight" not in self.files
        # A GPU that needs 4 bits has better use for the memory than some rows of a table that the host can look up.
        at_host = self.in_4bit and not is_tied
        name, device = "model.embed_tokens.weight", _CPU if at_host else self.device
        is_narrow = is_tied and self.operations.widens and self.files.read(name).dtype == torch.bfloat16
        embedding = self.files.copy(name, torch.bfloat16 if is_narrow else self.dtype, device)
        head = embedding if is_tied else self.read("lm_head.weight")
        rows: dict[str, NewTokenRows] = {}
        if new_tokens:
            rows[_EMBEDDING_ROWS] = NewTokenRows(embedding, new_tokens[0], len(new_tokens))
            if not is_tied:
                rows[_HEAD_ROWS] = NewTokenRows(head, new_tokens[0], len(new_tokens))
        head_product = self.operations.product(head, head.shape[1])
        if is_tied and isinstance(head_product, CompiledProduct):
            embedding = head_product.frozen
        decoder = Decoder(
            heads=Heads(architecture.queries, architecture.keys, architecture.head_width),
            settings=[_setting(architecture, pattern, self.device) for pattern in architecture.patterns],
            layers=layers,
            factors=_factors(architecture, self.dtype),
            embedding=embedding,
            head=head_product,
            norm=self.norm("model.norm"),
            operations=self.operations,
            rows=VocabularyRows(rows[_EMBEDDING_ROWS], rows.get(_HEAD_ROWS, rows[_EMBEDDING_ROWS])) if rows else None,
        )
        return decoder, rows

    def layers(self) -> list[Layer]:
        """Read all layers."""
        architecture = self.architecture
        linears, patterns = _linears(architecture), architecture.patterns
        return [
            self.layer(prefix, linears, patterns.index(pattern))
            for prefix, pattern in zip(_prefixes(architecture), architecture.layers, strict=True)
        ]

    def norm(self, name: str) -> Norm:
        return Norm(self.read(f"{name}.weight"), self.architecture.epsilon, self.architecture.family.norms_stored_less)

    def fused(self, prefix: str, names: Sequence[str]) -> FusedLinear:
        """Read several linear layers as one."""
        full = [f"{prefix}.{name}" for name in names]
        stored = [self.files.read(f"{name}.weight") for name in full]
        pairs = [self.pair(name, *weight.shape) for name, weight in zip(full, stored, strict=True)]
        is_plain = not self.in_4bit and all(pair is None or pair.lora_magnitude_vector is None for pair in pairs)
        weights = [(self.read_narrow if is_plain else self.read)(f"{name}.weight") for name in full]
        for at, pair in enumerate(pairs):
            if pair is not None and self.initial is not None:
                left = start(pair, self.initial, self.files.read(f"{full[at]}.weight"))
                weights[at] = left.to(self.device, self.dtype)
        biases = [self.read(f"{name}.bias") if f"{name}.bias" in self.files else None for name in full]
        self.adapters |= {name: pair for name, pair in zip(full, pairs, strict=True) if pair is not None}
        return self.linear(self.operations, weights, biases, pairs, self._compressed(full, weights))

    def _compressed(self, names: Sequence[str], weights: Sequence[Tensor]) -> Callable[[Tensor, int], Product] | None:
        """Return how the product of linear layers is made where their weights are kept in fewer bits."""
        blocks = self.blocks
        if blocks is None:
            return Nf4Product if self.in_4bit else None
        stored = [f"{name}.weight" for name in names]
        return lambda whole, changing: blocks.product(stored, weights, whole[:, changing:])

    @property
    def activation(self) -> Activation:
        return Activation(self.architecture.activation)

    def dense(self, gate_up: FusedLinear, down: FusedLinear) -> DenseMlp:
        return DenseMlp(self.operations, self.activation, gate_up, down)

    def experts(self, prefix: str) -> Experts:
        """Read the router and the experts of a layer, whose files have each expert's matrices apart, or all in one."""
        files = self.architecture.family.experts
        assert files is not None
        router = self.read(f"{prefix}.{files.block}.gate.weight")
        experts = f"{prefix}.{files.block}.experts"
        weights = {}
        for leaf, names in ((GATE_UP, (files.gate, files.up)), (DOWN, (files.down,))):
            if f"{experts}.{leaf}" in self.files:
                weights[leaf] = self.read_narrow(f"{experts}.{leaf}")
                continue
            matrices = [
                torch.cat([self.read_narrow(f"{experts}.{expert}.{name}.weight") for name in names])
                for expert in range(len(router))
            ]
            weights[leaf] = torch.stack(matrices)
        return Experts(
            self.operations,
            self.activation,
            router,
            weights,
            self.architecture.chosen_experts,
            self.architecture.normalizes_experts,
        )

    def layer(self, prefix: str, linears: Mapping[str, Sequence[str]], setting: int) -> Layer:
        """Read a layer; its linear layers get their adapters in the order of `linears`."""
        experts = self.architecture.family.experts
        routed = experts is not None and f"{prefix}.{experts.block}.gate.weight" in self.files
        fused = {
            part: self.fused(prefix, names)
            for part, names in linears.items()
            if not routed or part not in ("gate_up", "down")
        }
        norms = {part: self.norm(f"{prefix}.{name}") for part, name in _NORMS[self.architecture.family.norms].items()}
        heads_normed = f"{prefix}.self_attn.q_norm.weight" in self.files
        return Layer(
            setting=setting,
            qkv=fused["qkv"],
            out=fused["out"],
            mlp=self.experts(prefix) if routed else self.dense(fused["gate_up"], fused["down"]),
            attention_norm=norms.get("attention_norm"),
            attention_norm_after=norms.get("attention_norm_after"),
            mlp_norm=norms.get("mlp_norm"),
            mlp_norm_after=norms.get("mlp_norm_after"),
            query_norm=self.norm(f"{prefix}.self_attn.q_norm") if heads_normed else None,
            key_norm=self.norm(f"{prefix}.self_attn.k_norm") if heads_normed else None,
        )
