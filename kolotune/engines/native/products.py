"""The product of a row of tokens with a frozen matrix that has some changing columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InputGradient:
    """The gradient of linear layers' input, in the parts that their products give.

    Attributes:
        whole: ``[tokens, width + rank]``: the frozen weights' part, and behind it the gradient of the adapters' middle.
        width: of the input.
        down: ``[rank, width]``: the middle's gradient times this is the other part of the sum. None: `whole` is all.
    """

    whole: Tensor
    width: int
    down: Tensor | None

    def sum(self) -> Tensor:
        """The gradient, ``[tokens, width]``."""
        given = self.whole[:, : self.width]
        return given if self.down is None else torch.addmm(given, self.whole[:, self.width :], self.down)


class Product(Protocol):
    """A matrix ``[outputs, inputs]``, made to be multiplied with, forwards and backwards."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``[tokens, inputs]`` to ``[tokens, outputs]``."""

    def backward(self, d_out: Tensor) -> Tensor:
        """The gradient of x, ``[tokens, inputs]``."""

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        """Puts fp32 ``values [rows, columns]`` into the matrix."""


class PlainProduct:
    """A matrix as PyTorch has it; see `Product`."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Product`."""
        return nn.functional.linear(x, self._weight, bias)

    def backward(self, d_out: Tensor) -> Tensor:
        """See `Product`."""
        return torch.mm(d_out, self._weight)

    def replace(self, rows: slice, columns: slice, values: Tensor) -> None:
        """See `Product`."""
        self._weight[rows, columns] = values
