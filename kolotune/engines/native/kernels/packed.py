"""Frozen matrices in the layout that the processor multiplies in, so that no step lays them out again.

oneDNN brings a matrix into blocks before each product; for a few hundred tokens that takes a tenth to a fifth of the
product's time, twice a step. PyTorch can keep the blocks. Which layout they have depends on the processor and is
nowhere promised, so it is found by laying out matrices of known numbers, and believed only if it is that of the real
matrix too; it must be known because the adapters' columns change with each step.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..products import PlainProduct, Product

_DIGIT = 128  # bf16 holds whole numbers up to 256
_SAMPLE = 4096  # numbers of a matrix whose places are checked
_ANY_TOKENS = 512  # the layout is chosen for this many, and used for all numbers of them
_mkldnn: Any = torch.ops.mkldnn


class PackedProduct:
    """A bf16 matrix, laid out for both directions; see `products.Product`.

    Args:
        weight: ``[outputs, inputs]``; not kept.
        changing: inputs from this one on are changed by `replace`.
        place: `place_bf16` of kernels.cpp.

    Raises:
        LayoutError: PyTorch has no such layout here, or it is one that can't be written to.
    """

    def __init__(self, weight: Tensor, changing: int, place: Callable[..., None]) -> None:
        self._changing, self._place = changing, place
        self._forward, self._backward = _pack(weight), _pack(weight.t().contiguous())
        self._changes = changing < weight.shape[1]
        if self._changes:
            self._forward_places = _places(self._forward, weight)
            self._backward_places = _places(self._backward, weight.t())[::-1]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Product`."""
        result: Tensor = _mkldnn._linear_pointwise(x, self._forward, bias, "none", [], "")
        return result

    def backward(self, d_out: Tensor) -> Tensor:
        """See `Product`."""
        result: Tensor = _mkldnn._linear_pointwise(d_out, self._backward, None, "none", [], "")
        return result

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        """See `Product`; only columns from `changing` on."""
        assert self._changes and columns.start >= self._changing and values.is_contiguous()
        packed = ((self._forward, self._forward_places), (self._backward, self._backward_places))
        for matrix, (row_places, column_places) in packed:
            self._place(
                values.data_ptr(), row_places[rows].data_ptr(), column_places[columns].data_ptr(),
                _mkldnn.data_ptr(matrix), *values.shape,
            )  # fmt: skip


class LayoutError(Exception):
    """A matrix can't be kept laid out; it is multiplied with as it is."""


def packed_or_plain(weight: Tensor, changing: int, place: Callable[..., None]) -> Product:
    """The matrix laid out for this processor, or as it is where that can't be done."""
    try:
        return PackedProduct(weight, changing, place)
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
    """A packed matrix's own memory, bf16 ``[numbers]``; it must not be used longer than the matrix lives."""
    size = int(_mkldnn._nbytes(packed))
    return torch.frombuffer((ctypes.c_char * size).from_address(_mkldnn.data_ptr(packed)), dtype=torch.bfloat16)


def _places(packed: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where the numbers of `packed`, made from `weight`, lie; see `_layout`.

    Raises:
        LayoutError: they don't lie there.
    """
    by_row, by_column = _layout(*weight.shape)
    dice = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(size, (_SAMPLE,), generator=dice) for size in weight.shape)
    if not torch.equal(_memory(packed)[by_row[rows] + by_column[columns]], weight[rows, columns]):
        raise LayoutError("the layout is another one for other numbers")
    return by_row, by_column


@functools.cache
def _layout(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where a packed matrix's numbers lie: that of a row and a column is the sum of both entries.

    Returns:
        int64 ``[rows]`` and ``[columns]``.

    Raises:
        LayoutError: they lie otherwise.
    """
    count = rows * columns
    numbers = torch.arange(1, count + 1).view(rows, columns)  # from 1 on: 0 stands in the padding
    found: Tensor | None = None
    weighted = 1
    while weighted <= count:
        packed = _pack((numbers // weighted % _DIGIT).to(torch.bfloat16))
        digits = _memory(packed).long() * weighted
        found = digits if found is None else found + digits
        weighted *= _DIGIT
    assert found is not None
    if found.min() < 0 or found.max() > count:
        raise LayoutError("the layout holds more than the numbers")
    place = torch.full((count + 1,), -1)
    place[found] = torch.arange(len(found))
    place = place[1:].view(rows, columns)
    by_row, by_column = place[:, 0].contiguous(), place[0] - place[0, 0]
    if (place < 0).any() or not torch.equal(place, by_row[:, None] + by_column):
        raise LayoutError("the layout is no sum of rows and columns")
    return by_row, by_column
