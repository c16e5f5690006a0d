"""The shape of a model and of its LoRA adapter, read from headers and config.json without loading a weight."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from kolotune.foundation.errors import ModelError
from kolotune.foundation.name_patterns import by_pattern, read_patterns

from .composite_models import language_shapes
from .model_config import ModelConfig, read_model_config
from .safetensors_header import Entry, read_header
from .stored_blocks import read_matrices
from .weight_files import weight_files

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "f16": 2}
"""Bytes per weight, by the dtype's name in the options."""
FP32_BYTES = DTYPE_BYTES["fp32"]
HEADER_ENTRY_BYTES = 170
"""Header bytes per tensor of an adapter or an optimizer, measured on SmolLM2."""

_ALL_LINEAR = "all-linear"
_ALL_EXPERTS = "all-experts"
_ONE_EXPERT = re.compile(r"(.+\.experts)\.\d+\.(?:.+\.)?(\w+)\.weight")
_ALL_IN_ONE = re.compile(r"(.+\.(?:experts|block_sparse_moe))\.(\w+?)(?:\.weight)?")
_LEAVES = {"w2": "down_proj", "output_linear": "down_proj", "down_proj": "down_proj"}
"""The last matrix of an expert, in the names of files; the others are computed as one, except where there is one."""
_ROUTER = re.compile(r".+\.(gate|router|router\.layer)$")
_STATE_FILE_BYTES = 2_000  # the JSON file beside a checkpoint's tensors


@dataclass(frozen=True)
class Linear:
    """A linear layer with weights ``[outputs, inputs]``; `name` has no ``.weight`` suffix."""

    name: str
    outputs: int
    inputs: int

    @property
    def weight_count(self) -> int:
        return self.outputs * self.inputs


@dataclass(frozen=True)
class ExpertWeights:
    """One weight of all experts of a layer, as transformers has it: gate and up are one.

    Attributes:
        name: such as ``model.layers.0.mlp.experts.down_proj``.
        experts: how many.
        sides: inputs and outputs, added, of each.
        weight_count: weights of all.
    """

    name: str
    experts: int
    sides: int
    weight_count: int


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        entries: all tensors.
        linears: the linear layers inside decoder layers, which can get an adapter.
        layers: the number of decoder layers.
        hidden_size: width of the layers.
        attention_heads, key_value_heads: heads per layer.
        head_size: width of a head.
        vocabulary_size: the number of tokens.
        tied: whether the embedding also serves as the output head.
        experts_per_token: how many experts of a layer compute a token; 0 without experts.
        blocks: bytes of the linear layers that the folder has in the blocks of a GGUF, too, by their names.
    """

    entries: tuple[Entry, ...]
    linears: tuple[Linear, ...]
    layers: int
    hidden_size: int
    attention_heads: int
    key_value_heads: int
    head_size: int
    vocabulary_size: int
    tied: bool
    experts_per_token: int = 0
    blocks: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def experts(self) -> tuple[ExpertWeights, ...]:
        """The weights of experts, whether the files have them one by one or in one."""
        return _expert_weights(self.entries)

    @property
    def weight_count(self) -> int:
        """Weights in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors in the model's own files."""
        return sum(entry.size for entry in self.entries)

    @property
    def layer_weight_count(self) -> int:
        """Weights in the linear layers of all decoder layers; sharding splits these."""
        return sum(linear.weight_count for linear in self.linears)

    @property
    def dense_weight_count(self) -> int:
        """Weights in the linear layers of all decoder layers, without those of experts."""
        return sum(linear.weight_count for linear in self.linears if not _ONE_EXPERT.fullmatch(f"{linear.name}.weight"))

    @property
    def bf16_weight_count(self) -> int:
        """Weights stored in bf16: of linear layers and experts, and of the embedding if it is also the head."""
        counted = {f"{linear.name}.weight" for linear in self.linears}
        counted |= {entry.name for entry in self.entries if len(entry.shape) == 3 and _ALL_IN_ONE.fullmatch(entry.name)}
        if self.tied:
            counted |= {entry.name for entry in self.entries if entry.name.endswith("embed_tokens.weight")}
        return sum(math.prod(entry.shape) for entry in self.entries if entry.dtype == "BF16" and entry.name in counted)

    @property
    def first_layer(self) -> tuple[Linear, ...]:
        """The linear layers of the first decoder layer."""
        return self.linears[: len(self.linears) // max(1, self.layers)]

    @property
    def norms_heads(self) -> bool:
        """Whether queries and keys are normalized."""
        return any(entry.name.endswith(".q_norm.weight") for entry in self.entries)

    @property
    def norms_outputs(self) -> bool:
        """Whether the outputs of attention and MLP are normalized before they are added."""
        return any(entry.name.endswith(".post_feedforward_layernorm.weight") for entry in self.entries)

    @property
    def mlp_size(self) -> int:
        """The width inside the MLP; four times the hidden size if there is no ``down_proj``."""
        down = [linear.inputs for linear in self.first_layer if linear.name.endswith(".down_proj")]
        return down[-1] if down else 4 * self.hidden_size


def read_shape(folder: Path) -> ModelShape:
    """Read the shape of a model folder from its config.json and the headers of its safetensors files.

    Raises:
        ModelError: a safetensors file is missing or damaged.
    """
    config = read_model_config(folder)
    entries: list[Entry] = []
    for path in weight_files(folder):
        entries += read_header(path).entries
    language = _language_weights(entries, config)
    linears = _linears_in_layers([entry for entry in entries if entry.name in language])
    names = {linear.name for linear in linears}
    blocks = {matrix.name.removesuffix(".weight"): matrix.entry.size for matrix in read_matrices(folder)}
    return ModelShape(
        entries=tuple(entries),
        linears=linears,
        layers=config.layers,
        hidden_size=config.hidden_size,
        attention_heads=config.attention_heads,
        key_value_heads=config.key_value_heads,
        head_size=config.head_size,
        vocabulary_size=config.vocabulary_size,
        tied=not any(entry.name.endswith("lm_head.weight") for entry in entries),
        experts_per_token=config.integer("num_experts_per_tok", "num_experts_per_token") or 0,
        blocks={name: size for name, size in blocks.items() if name in names},
    )


def _language_weights(entries: Sequence[Entry], config: ModelConfig) -> Collection[str]:
    """Return the names of the language model's weights; of all weights where it can't be found."""
    shapes = {entry.name: entry.shape for entry in entries}
    try:
        return language_shapes(shapes, config)
    except ModelError:
        return shapes


def _linears_in_layers(entries: Sequence[Entry]) -> tuple[Linear, ...]:
    """Return the matrices whose name has a layer's number, in the order of the layers."""
    linears = []
    for entry in entries:
        numbers = [int(part) for part in entry.name.split(".") if part.isdecimal()]
        if numbers and len(entry.shape) == 2 and entry.name.endswith(".weight"):
            linears.append((numbers[0], Linear(entry.name.removesuffix(".weight"), *entry.shape)))
    linears.sort(key=lambda numbered: numbered[0])
    return tuple(linear for _, linear in linears)


def _expert_weights(entries: Sequence[Entry]) -> tuple[ExpertWeights, ...]:
    single: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    weights = []
    for entry in entries:
        if len(entry.shape) == 2 and (match := _ONE_EXPERT.fullmatch(entry.name)):
            single[match[1], _LEAVES.get(match[2], "gate_up_proj")].append(entry)
        elif len(entry.shape) == 3 and (match := _ALL_IN_ONE.fullmatch(entry.name)):
            count, *sides = entry.shape
            name = f"{match[1]}.{_LEAVES.get(match[2], 'gate_up_proj')}"
            weights.append(ExpertWeights(name, count, sum(sides), math.prod(entry.shape)))
    for (prefix, leaf), parts in single.items():
        count = len({part.name.removeprefix(prefix).split(".")[1] for part in parts})
        outputs = sum(part.shape[0] for part in parts) // count
        total = sum(math.prod(part.shape) for part in parts)
        weights.append(ExpertWeights(f"{prefix}.{leaf}", count, outputs + parts[0].shape[1], total))
    return tuple(weights)


class AdapterOptions(Protocol):
    """The options that decide an adapter's shape, of `Config` or of a job."""

    @property
    def lora_rank(self) -> int: ...
    @property
    def target_modules(self) -> Sequence[str]: ...
    @property
    def target_parameters(self) -> Sequence[str]: ...
    @property
    def use_dora(self) -> bool: ...
    @property
    def init_lora_weights(self) -> str: ...
    @property
    def rank_pattern(self) -> Sequence[str]: ...
    @property
    def modules_to_save(self) -> Sequence[str]: ...


def saved_module(weight: str) -> str:
    """Return the last part of the name of a weight's module, as `modules_to_save` has it."""
    return weight.rpartition(".")[0].rpartition(".")[2]


def _is_saved(weight: str, shape: ModelShape, options: AdapterOptions) -> bool:
    """Whether a weight is trained whole: a tied embedding also if the head is named."""
    is_embedding = shape.tied and saved_module(weight) in ("embed_tokens", "wte", "embed_in")
    return saved_module(weight) in options.modules_to_save or (is_embedding and "lm_head" in options.modules_to_save)


@dataclass(frozen=True)
class AdapterShape:
    """A LoRA adapter without its weights.

    Attributes:
        weight_count: weights in all matrices.
        matrices: the number of matrices, two per adapted layer.
        rank: of the matrices, but for those that a pattern names.
        adapted: names of the linear layers and of the experts' weights that have an adapter.
        has_magnitudes: whether each output of an adapted linear layer has a magnitude (DoRA).
        rank_patterns: exceptions; see `foundation.name_patterns`.
        keeps_start: whether it starts as a part of the weights, which is kept and saved, too (PiSSA, OLoRA).
    """

    weight_count: int
    matrices: int
    rank: int
    adapted: frozenset[str]
    has_magnitudes: bool = False
    keeps_start: bool = False
    rank_patterns: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_options(cls, shape: ModelShape, options: AdapterOptions) -> AdapterShape:
        """Return the shape of the adapter that a training with these options has."""
        adapter = cls.of(
            shape,
            options.lora_rank,
            options.target_modules,
            options.target_parameters,
            has_magnitudes=options.use_dora,
            keeps_start=options.init_lora_weights != "default",
            rank_patterns=read_patterns(options.rank_pattern),
        )
        whole = [math.prod(entry.shape) for entry in shape.entries if _is_saved(entry.name, shape, options)]
        return replace(adapter, weight_count=adapter.weight_count + sum(whole), matrices=adapter.matrices + len(whole))

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        rank: int,
        targets: Sequence[str],
        parameters: Sequence[str] = (),
        *,
        has_magnitudes: bool = False,
        keeps_start: bool = False,
        rank_patterns: Mapping[str, float] | None = None,
    ) -> AdapterShape:
        """Return the adapter's shape for a model.

        Args:
            shape: the model's shape.
            rank: the LoRA rank.
            targets: the last parts of the linear layers' names, or ``["all-linear"]``.
            parameters: the ends of names of experts' weights, or ``["all-experts"]``; [] for none.
            has_magnitudes, keeps_start, rank_patterns: see the attributes.
        """
        patterns = rank_patterns or {}
        all_linear = list(targets) == [_ALL_LINEAR]
        chosen = [
            linear
            for linear in shape.linears
            if (all_linear or linear.name.rpartition(".")[2] in targets)
            and not (shape.experts and (_ONE_EXPERT.fullmatch(f"{linear.name}.weight") or _ROUTER.match(linear.name)))
        ]
        leaves = {parameter.rpartition(".")[2] for parameter in parameters}
        experts = [
            weight for weight in shape.experts if _ALL_EXPERTS in leaves or weight.name.rpartition(".")[2] in leaves
        ]
        return cls(
            weight_count=sum(
                int(by_pattern(patterns, each.name, rank)) * (each.inputs + each.outputs) for each in chosen
            )
            + sum(int(by_pattern(patterns, each.name, rank)) * each.experts * each.sides for each in experts)
            + sum(linear.outputs for linear in chosen if has_magnitudes),
            matrices=(3 if has_magnitudes else 2) * len(chosen) + 2 * len(experts),
            rank=rank,
            adapted=frozenset([*(linear.name for linear in chosen), *(weight.name for weight in experts)]),
            has_magnitudes=has_magnitudes,
            keeps_start=keeps_start,
            rank_patterns=patterns,
        )

    def rank_of(self, name: str) -> int:
        """Return the rank of the matrices of a layer, or of a weight of experts."""
        return int(by_pattern(self.rank_patterns, name, self.rank))

    def scaled_outputs(self, shape: ModelShape) -> int:
        """Return how many outputs of a model's first layer are scaled to a magnitude."""
        return sum(
            linear.outputs for linear in shape.first_layer if self.has_magnitudes and linear.name in self.adapted
        )

    def share_of(self, shape: ModelShape) -> float:
        """Return which share of the weights in a model's layers has an adapter, from 0 to 1."""
        apart = [linear for linear in shape.linears if not _ONE_EXPERT.fullmatch(f"{linear.name}.weight")]
        matrices: list[Linear | ExpertWeights] = [*apart, *shape.experts]
        reached = sum(each.weight_count for each in matrices if each.name in self.adapted)
        return reached / max(1, sum(each.weight_count for each in matrices))

    @property
    def file_bytes(self) -> int:
        """Bytes of the adapter's folder, in fp32."""
        weights = self.weight_count * (2 if self.keeps_start else 1)
        return FP32_BYTES * weights + HEADER_ENTRY_BYTES * self.matrices

    def checkpoint_bytes(self, keeps_best: bool, dtype_bytes: int = FP32_BYTES) -> int:
        """Bytes of a checkpoint: the adapter, AdamW's two moments, and the best adapter if one is kept."""
        copies = 4 if keeps_best else 3
        return copies * (dtype_bytes * self.weight_count + HEADER_ENTRY_BYTES * self.matrices) + _STATE_FILE_BYTES
