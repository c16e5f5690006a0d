"""The memory that measuring a model in fp32 takes."""

from __future__ import annotations

import math
from pathlib import Path

from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.weight_files import weight_files

_BYTES = 4
MEMORY_FACTOR = 1.2
"""For what is needed besides the weights: activations, logits, the libraries."""


def fp32_bytes(folder: Path) -> int:
    """Return the bytes that a model's weights take in fp32."""
    return sum(math.prod(entry.shape) for entry in MappedTensors(weight_files(folder)).entries.values()) * _BYTES


def fits_into_memory(folder: Path) -> bool:
    """Return whether a model fits into free memory."""
    import psutil

    return fp32_bytes(folder) * MEMORY_FACTOR < psutil.virtual_memory().available
