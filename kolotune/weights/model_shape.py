"""The shape of a model and of its LoRA adapter, read from headers and config.json without loading a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .model_config import read_model_config
from .safetensors_header import Entry, read_header
from .weight_files import weight_files

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "f16": 2}
"""Bytes per weight, by the dtype's name in the options."""
FP32_BYTES = DTYPE_BYTES["fp32"]
HEADER_ENTRY_BYTES = 170
"""Header bytes per tensor of an adapter or an optimizer, measured on SmolLM2."""

_ALL_LINEAR = "all-linear"
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
    def first_layer(self) -> tuple[Linear, ...]:
        """The linear layers of the first decoder layer."""
        return self.linears[: len(self.linears) // max(1, self.layers)]

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
    return ModelShape(
        entries=tuple(entries),
        linears=_linears_in_layers(entries),
        layers=config.layers,
        hidden_size=config.hidden_size,
        attention_heads=config.attention_heads,
        key_value_heads=config.key_value_heads,
        head_size=config.head_size,
        vocabulary_size=config.vocabulary_size,
        tied=not any(entry.name.endswith("lm_head.weight") for entry in entries),
    )


def _linears_in_layers(entries: Sequence[Entry]) -> tuple[Linear, ...]:
    """Return the matrices whose name has a layer's number, in the order of the layers."""
    linears = []
    for entry in entries:
        numbers = [int(part) for part in entry.name.split(".") if part.isdecimal()]
        if numbers and len(entry.shape) == 2 and entry.name.endswith(".weight"):
            linears.append((numbers[0], Linear(entry.name.removesuffix(".weight"), *entry.shape)))
    linears.sort(key=lambda numbered: numbered[0])
    return tuple(linear for _, linear in linears)


@dataclass(frozen=True)
class AdapterShape:
    """A LoRA adapter without its weights.

    Attributes:
        weight_count: weights in all matrices.
        matrices: the number of matrices, two per adapted layer.
        rank: of the matrices.
        adapted: names of the linear layers that have an adapter.
    """

    weight_count: int
    matrices: int
    rank: int
    adapted: frozenset[str]

    @classmethod
    def of(cls, shape: ModelShape, rank: int, targets: Sequence[str]) -> AdapterShape:
        """Return the adapter's shape for a model.

        Args:
            shape: the model's shape.
            rank: the LoRA rank.
            targets: the last parts of the linear layers' names, or ``["all-linear"]``.
        """
        all_linear = list(targets) == [_ALL_LINEAR]
        chosen = [linear for linear in shape.linears if all_linear or linear.name.rpartition(".")[2] in targets]
        return cls(
            weight_count=sum(rank * (linear.inputs + linear.outputs) for linear in chosen),
            matrices=2 * len(chosen),
            rank=rank,
            adapted=frozenset(linear.name for linear in chosen),
        )

    @property
    def file_bytes(self) -> int:
        """Bytes of the adapter's folder, in fp32."""
        return FP32_BYTES * self.weight_count + HEADER_ENTRY_BYTES * self.matrices

    def checkpoint_bytes(self, keeps_best: bool, dtype_bytes: int = FP32_BYTES) -> int:
        """Bytes of a checkpoint: the adapter, AdamW's two moments, and the best adapter if one is kept."""
        copies = 4 if keeps_best else 3
        return copies * (dtype_bytes * self.weight_count + HEADER_ENTRY_BYTES * self.matrices) + _STATE_FILE_BYTES
