"""Frozen matrices in the blocks of a quantized GGUF, dequantized one at a time when they are multiplied.

So an adapter is trained on exactly the weights that the file's users have. A model folder has such blocks where
`kolotune dequantize` made it (`weights.stored_blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kolotune.weights import stored_blocks
from kolotune.weights.torch_tensors import TensorFiles

from .ggml_blocks import TYPES, dequantize
from .matrix_product import DequantizedProduct
from .memory import BLOCKS_AT_ONCE, CPU_AT_ONCE


class BlockRows:
    """Rows of a matrix in blocks of one type.

    Args:
        rows: uint8 ``[rows, bytes of a row]``.
        kind: the type, one of `ggml_blocks.TYPES`.
    """

    def __init__(self, rows: Tensor, kind: str) -> None:
        block, size, _ = TYPES[kind]
        self._rows, self._kind = rows, kind
        self.shape = torch.Size((len(rows), rows.shape[1] // size * block))

    def dequantize_into(self, target: Tensor) -> None:
        """Write the values into ``target [rows, columns]``."""
        weights = min(BLOCKS_AT_ONCE, CPU_AT_ONCE) if self._rows.device.type == "cpu" else BLOCKS_AT_ONCE
        step = max(1, weights // self.shape[1])
        for start in range(0, len(self._rows), step):
            rows = slice(start, start + step)
            target[rows] = dequantize(self._rows[rows], self._kind)


class BlockMatrix:
    """Matrices with the same columns, one below the other, each in blocks, or whole where the file has it whole.

    Args:
        parts: the matrices.
        device: of the result.
    """

    def __init__(self, parts: Sequence[BlockRows | Tensor], device: torch.device) -> None:
        self._parts, self._device = parts, device
        self.shape = torch.Size((sum(part.shape[0] for part in parts), parts[0].shape[1]))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in `dtype`."""
        result = torch.empty(self.shape, dtype=dtype, device=self._device)
        start = 0
        for part in self._parts:
            target = result[start : start + part.shape[0]]
            if isinstance(part, Tensor):
                target.copy_(part)
            else:
                part.dequantize_into(target)
            start += part.shape[0]
        return result


class BlockFiles:
    """The blocks of a model folder, read when they are needed.

    Args:
        folder: the model's.
        device: where they are kept.

    Raises:
        ModelError: the file of the blocks is damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        matrices = stored_blocks.read_matrices(folder)
        self._files = TensorFiles([folder / stored_blocks.FILE])
        self._matrices: Mapping[str, stored_blocks.StoredMatrix] = {matrix.name: matrix for matrix in matrices}
        self._device = device

    def product(self, names: Sequence[str], weights: Sequence[Tensor], added: Tensor) -> DequantizedProduct:
        """Return the product with some of the model's weights, one below the other.

        Args:
            names: of the weights.
            weights: their values, kept of those that the GGUF has whole.
            added: the adapters' columns, ``[outputs, rank]``.
        """
        parts = [self._part(name, weight) for name, weight in zip(names, weights, strict=True)]
        return DequantizedProduct(BlockMatrix(parts, self._device), added)

    def _part(self, name: str, weight: Tensor) -> BlockRows | Tensor:
        matrix = self._matrices.get(name)
        if matrix is None:
            return weight
        return BlockRows(self._files.read(matrix.entry.name).to(self._device, copy=True), matrix.type)
