"""The product of tokens with a frozen matrix of which some columns, those of the adapters, change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import few_rows


@dataclass(frozen=True)
class InputGradient:
    """The gradient of the input of linear layers, as the sum of two terms.

    Attributes:
        whole: ``[tokens, width + rank]``: the term of the frozen weights, then the gradient of ``A x``.
        width: of the input.
        down: ``[rank, width]``: the gradient of ``A x`` times this is the adapters' term; None when there is none.
    """

    whole: Tensor
    width: int
    down: Tensor | None

    def sum(self) -> Tensor:
        """Return the gradient, ``[tokens, width]``."""
        given = self.whole[:, : self.width]
        return given if self.down is None else torch.addmm(given, self.whole[:, self.width :], self.down)


class Product(Protocol):
    """A matrix ``[outputs, inputs]`` in a layout for products in both directions."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product: ``[tokens, inputs]`` to ``[tokens, outputs]``."""

    def backward(self, d_out: Tensor) -> Tensor:
        """Return the gradient of x, ``[tokens, inputs]``."""

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        """Replace a part of the matrix by fp32 ``values [rows, columns]``."""


class PlainProduct:
    """A matrix in PyTorch's own layout."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float32 and x.device.type == "cpu":
            return few_rows.linear(x, self._weight, bias)
        return nn.functional.linear(x, self._weight, bias)

    def backward(self, d_out: Tensor) -> Tensor:
        return torch.mm(d_out, self._weight)

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        self._weight[rows, columns] = values


class Compressed(Protocol):
    """A frozen matrix that is kept in fewer bits."""

    @property
    def shape(self) -> torch.Size:
        """``[outputs, inputs]``."""

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in `dtype`."""


class DequantizedProduct:
    """The product with a matrix that is dequantized for each; the adapters' columns stay in the dtype.

    Args:
        frozen: the matrix.
        added: the adapters' columns, ``[outputs, rank]``; a copy is kept.
    """

    def __init__(self, frozen: Compressed, added: Tensor) -> None:
        self._frozen, self._added, self._inputs = frozen, added.clone(), frozen.shape[1]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        result = nn.functional.linear(x[:, : self._inputs], self._frozen.dequantize(x.dtype), bias)
        return result.addmm_(x[:, self._inputs :], self._added.t())

    def backward(self, d_out: Tensor) -> Tensor:
        d_x = d_out.new_empty(len(d_out), self._inputs + self._added.shape[1])
        d_x[:, : self._inputs] = d_out @ self._frozen.dequantize(d_out.dtype)
        d_x[:, self._inputs :] = d_out @ self._added
        return d_x

    def dequantize(self) -> Tensor:
        """Return the frozen matrix, ``[outputs, inputs]``, fp32."""
        return self._frozen.dequantize(torch.float32)

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        self._added[rows, columns.start - self._inputs : columns.stop - self._inputs] = values
