"""Frozen matrices in oneDNN's packed layout, so that no step packs them again.

oneDNN packs a matrix into blocks before each product. For a few hundred tokens that takes a tenth to a fifth of the
product's time, twice a step. PyTorch can keep the packed matrix. The adapters' columns change with each step, so the
layout must be known, but it depends on the processor and is not documented. It is found by packing matrices of known
numbers, and used only if it explains the real matrix too.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..matrix_product import PlainProduct, Product

_DIGIT = 128  # bf16 holds whole numbers up to 256
_SAMPLE = 4096  # numbers of a matrix whose offsets are checked
_ANY_TOKENS = 512  # the layout is chosen for this number of tokens, and used for any number
_mkldnn: Any = torch.ops.mkldnn


class PackedProduct:
    """A bf16 `Product`, packed for both directions.

    Args:
        weight: ``[outputs, inputs]``; not kept.
        changing: `replace` changes columns from this one on.
        write: `place_bf16` of kernels.cpp, which writes numbers to offsets.

    Raises:
        LayoutError: PyTorch has no packed layout here, or an unknown one.
    """

    def __init__(self, weight: Tensor, changing: int, write: Callable[..., None]) -> None:
        self._changing, self._write = changing, write
        self._forward, self._backward = _pack(weight), _pack(weight.t().contiguous())
        self._changes = changing < weight.shape[1]
        if self._changes:
            self._forward_offsets = _offsets(self._forward, weight)
            self._backward_offsets = _offsets(self._backward, weight.t())[::-1]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = _mkldnn._linear_pointwise(x, self._forward, bias, "none", [], "")
        return result

    def backward(self, d_out: Tensor) -> Tensor:
        result: Tensor = _mkldnn._linear_pointwise(d_out, self._backward, None, "none", [], "")
        return result

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        assert self._changes and columns.start >= self._changing and values.is_contiguous()
        packed = ((self._forward, self._forward_offsets), (self._backward, self._backward_offsets))
        for matrix, (row_offsets, column_offsets) in packed:
            self._write(
                values.data_ptr(), row_offsets[rows].data_ptr(), column_offsets[columns].data_ptr(),
                _mkldnn.data_ptr(matrix), *values.shape,
            )  # fmt: skip


class LayoutError(Exception):
    """A matrix can't be kept packed."""


def packed_or_plain(weight: Tensor, changing: int, write: Callable[..., None]) -> Product:
    """Return the matrix packed for this processor, or in PyTorch's layout where that is impossible."""
    try:
        return PackedProduct(weight, changing, write)
    except LayoutError:
        return PlainProduct(weight)


def _pack(weight: Tensor) -> Tensor:
    try:
        packed: Tensor = _mkldnn._reorder_linear_weight(weight, _ANY_TOKENS)
        _mkldnn.data_ptr(packed)
    except (RuntimeError, AttributeError) as error:
        raise LayoutError(str(error)) from error
    return packed


def _memory(packed: Tensor) -> Tensor:
    """Return a packed matrix's own memory, bf16 ``[numbers]``; it must not outlive the matrix."""
    size = int(_mkldnn._nbytes(packed))
    return torch.frombuffer((ctypes.c_char * size).from_address(_mkldnn.data_ptr(packed)), dtype=torch.bfloat16)


def _offsets(packed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the offsets of the numbers of `packed`, made from `weight`; see `_layout`.

    Raises:
        LayoutError: a number is at a different offset.
    """
    by_row, by_column = _layout(*weight.shape)
    dice = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(size, (_SAMPLE,), generator=dice) for size in weight.shape)
    if not torch.equal(_memory(packed)[by_row[rows] + by_column[columns]], weight[rows, columns]):
        raise LayoutError("the layout depends on the numbers")
    return by_row, by_column


@functools.cache
def _layout(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Find the layout of packed matrices: a number's offset is the sum of its row's and its column's.

    Returns:
        int64 ``[rows]`` and ``[columns]``.

    Raises:
        LayoutError: the layout has another structure.
    """
    count = rows * columns
    numbers = torch.arange(1, count + 1).view(rows, columns)  # from 1 on: the padding is 0
    numbers_found: Tensor | None = None
    weighted = 1
    while weighted <= count:
        packed = _pack((numbers // weighted % _DIGIT).to(torch.bfloat16))
        digits = _memory(packed).long() * weighted
        numbers_found = digits if numbers_found is None else numbers_found + digits
        weighted *= _DIGIT
    assert numbers_found is not None
    if numbers_found.min() < 0 or numbers_found.max() > count:
        raise LayoutError("the layout holds other numbers too")
    offsets = torch.full((count + 1,), -1)
    offsets[numbers_found] = torch.arange(len(numbers_found))
    offsets = offsets[1:].view(rows, columns)
    by_row, by_column = offsets[:, 0].contiguous(), offsets[0] - offsets[0, 0]
    if (offsets < 0).any() or not torch.equal(offsets, by_row[:, None] + by_column):
        raise LayoutError("the offsets are not sums of rows and columns")
    return by_row, by_column
