"""The product of tokens with a frozen matrix of which some columns, those of the adapters, change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


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
        return nn.functional.linear(x, self._weight, bias)

    def backward(self, d_out: Tensor) -> Tensor:
        return torch.mm(d_out, self._weight)

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        self._weight[rows, columns] = values
