"""Does a base model lie on a quantization grid? ``python -m … MODEL`` asks ggml which types would erase a training.

Weights that come from a quantized file, or were trained for one, have few distinct values in a block. Fine-tuning moves
them by less than half a step, and rounding to the same grid takes that back. So a small change is planted in some of
the base's rows, and each type is asked how much of it is left. A separate process, because the library may abort.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ModelError, ToolchainError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.llamacpp import ggml
from kolotune.runners import child_process
from kolotune.weights.dtypes import FLOATS, as_f32
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.safetensors_header import Entry
from kolotune.weights.weight_files import weight_files

from . import header
from .stored_values import dequantized

if TYPE_CHECKING:
    import numpy as np

_TYPES = ("Q3_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
_BLOCK = 32
_FEW_VALUES = 29.0
"""Mean number of distinct values in a block. Of 32 random weights in bf16 about 31 are distinct, on a grid of 6 bits
27, of 4 bits at most 16."""

_MOST_MATRICES, _ROWS = 8, 32
_CHANGE, _RANK = 0.02, 4  # of the weights' size, as a LoRA makes it
_ERASED, _KEPT = 0.5, 0.8


@dataclass(frozen=True)
class BaseGrid:
    """How much of a small change each type keeps; types that were not asked are missing.

    Attributes:
        change_kept: shares by type, from 0 (the base comes back) to about 1.
    """

    change_kept: Mapping[str, float]

    @property
    def erasing(self) -> list[str]:
        """Types that take most of a change back."""
        return [kind for kind, kept in self.change_kept.items() if kept < _ERASED]

    @property
    def keeping(self) -> list[str]:
        """Types that keep it."""
        return [kind for kind, kept in self.change_kept.items() if abs(kept - 1) < 1 - _KEPT]


def find_grid(model: Path, log: Path) -> BaseGrid | None:
    """Return on what grid a model's weights lie; None where they lie on none, as those of most models.

    Args:
        model: folder in the Hugging Face format.
        log: receives what ggml prints.
    """
    try:
        distinct = _distinct_values(model)
    except (ArtifactError, ModelError):  # merging says what is wrong with them
        return None
    if distinct >= _FEW_VALUES:
        return None
    kept: dict[str, float] = {}

    def on_event(event: str, fields: JsonObject) -> None:
        if event == "kept":
            kept[str(fields["type"])] = typed_storage.convert(float, fields["share"])

    with suppress(ArtifactError, ToolchainError):  # the reason is in the log
        child_process.run(__name__, str(model), log=log, otherwise=ToolchainError, on_event=on_event)
    grid = BaseGrid(kept)
    return grid if grid.erasing else None


def _distinct_values(model: Path) -> float:
    """The mean number of distinct values in a block; that of a block without equal ones if there is none."""
    import numpy as np

    counts = []
    for values in _samples(model):
        ordered = np.sort(values.reshape(-1, _BLOCK), axis=1)
        counts.append(1 + np.count_nonzero(np.diff(ordered, axis=1), axis=1).mean())
    return float(np.mean(counts)) if counts else float(_BLOCK)


def _samples(model: Path) -> Iterator[np.ndarray]:
    """Yield some rows of some matrices of the layers, fp32, evenly over the model."""
    tensors = MappedTensors(weight_files(model))
    matrices = [entry for entry in tensors.entries.values() if _is_matrix_of_a_layer(entry)]
    for number in range(min(_MOST_MATRICES, len(matrices))):
        entry = matrices[number * len(matrices) // min(_MOST_MATRICES, len(matrices))]
        step = max(1, entry.shape[0] // _ROWS)
        yield as_f32(tensors[entry.name][::step][:_ROWS], entry.dtype)


def _is_matrix_of_a_layer(entry: Entry) -> bool:
    is_matrix = len(entry.shape) == 2 and entry.dtype in FLOATS and entry.shape[1] % _BLOCK == 0
    return is_matrix and any(part.isdigit() for part in entry.name.split("."))


def main(arguments: list[str]) -> int:
    """Report for each type how much of a planted change it keeps; return the exit code."""
    return child_process.carry_out(lambda: _report(Path(arguments[0])))


def _report(model: Path) -> None:
    for kind, share in change_kept(list(_samples(model))).items():
        child_process.emit("kept", type=kind, share=share)


def change_kept(samples: list[np.ndarray]) -> dict[str, float]:
    """Return how much of a planted change each type keeps: the projection of what comes back onto the change.

    Args:
        samples: rows of a base's matrices, fp32.
    """
    import numpy as np

    random = np.random.default_rng(0)
    planted = []
    for weights in samples:
        change = random.standard_normal((len(weights), _RANK)) @ random.standard_normal((_RANK, weights.shape[1]))
        change *= _CHANGE * float(np.linalg.norm(weights)) / float(np.linalg.norm(change))
        planted.append((weights, change.astype(np.float32)))
    shares = {}
    for kind in _TYPES:
        fitting = [pair for pair in planted if pair[0].shape[1] % header.block_of(kind)[0] == 0]
        kept = [
            float(np.vdot(_rounded(weights + change, kind) - weights, change)) / float(np.vdot(change, change))
            for weights, change in fitting
            if change.any()  # of a matrix of zeros there is none
        ]
        if kept:
            shares[kind] = sum(kept) / len(kept)
    return shares


def _rounded(values: np.ndarray, kind: str) -> np.ndarray:
    import numpy as np

    number = header.type_number(kind)
    data = np.empty(header.size_of(values.shape, kind), np.uint8)
    rows, columns = values.shape
    values = np.ascontiguousarray(values)
    ggml.library().ggml_quantize_chunk(number, values.ctypes.data, data.ctypes.data, 0, rows, columns, None)
    return dequantized(data, kind).reshape(values.shape)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
