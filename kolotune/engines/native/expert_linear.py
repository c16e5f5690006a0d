"""One weight of all experts of a layer, with its adapters: forward and backward.

Each expert computes its own rows with its frozen matrix and, where it has an adapter, two thin products beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from .expert_lora import LoraExpertWeight
from .expert_products import ExpertProducts, Groups


@dataclass(frozen=True)
class ExpertRows:
    """Rows in the order of their experts.

    Attributes:
        numbers: ``[rows, width]``, or ``[tokens, width]`` with an index.
        index: the token of each row, int64 ``[rows]``; None if the numbers are the rows.
    """

    numbers: Tensor
    index: Tensor | None = None

    def gathered(self) -> Tensor:
        """Return the rows, ``[rows, width]``."""
        return self.numbers if self.index is None else self.numbers[self.index]


class ExpertLinear(Protocol):
    """One weight of all experts.

    Attributes:
        weight: frozen, ``[experts, outputs, inputs]``.
        update: the experts' adapters, once they exist.
    """

    weight: Tensor
    update: LoraExpertWeight | None

    def forward(self, x: ExpertRows, groups: Groups, masks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Compute ``[rows, outputs]`` from ``[rows, inputs]``.

        Args:
            x: the input.
            groups: how the rows belong to experts.
            masks: in training with dropout, receives the mask of all rows.

        Returns:
            The output, and what `backward` needs of the adapters, ``[rows, rank]``.
        """

    def backward(
        self, d_out: ExpertRows, x: ExpertRows, low: Tensor, groups: Groups, masks: list[Tensor] | None
    ) -> Tensor:
        """Add to the adapters' gradients; return that of ``x``, ``[rows, inputs]``.

        Args:
            d_out: the gradient of the output.
            x, groups, masks: those of `forward`.
            low: from `forward`.
        """


class PlainExpertLinear:
    """`ExpertLinear` by PyTorch's products.

    Args:
        products: computes them.
        weight: see `ExpertLinear`.
    """

    def __init__(self, products: ExpertProducts, weight: Tensor) -> None:
        self._products, self.weight = products, weight
        self.update: LoraExpertWeight | None = None

    def forward(self, x: ExpertRows, groups: Groups, masks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        rows, products, update = x.gathered(), self._products, self.update
        out = self.frozen_forward(rows, groups)
        if update is None:
            return out, rows.new_empty(0)
        if masks is not None and isinstance(update.dropout, nn.Dropout):
            masks.append(nn.functional.dropout(torch.ones_like(rows), update.dropout.p))
            rows = rows * masks[-1]
        a, b = (each.detach().to(rows.dtype) for each in (update.lora_A, update.lora_B))
        low = products.forward(rows, a, groups)
        products.add_forward(out, low, b, groups, update.scale)
        return out, low

    def backward(
        self, d_out: ExpertRows, x: ExpertRows, low: Tensor, groups: Groups, masks: list[Tensor] | None
    ) -> Tensor:
        d_rows, products, update = d_out.gathered(), self._products, self.update
        d_x = self.frozen_backward(d_rows, groups)
        if update is None:
            return d_x
        assert update.lora_A.grad is not None and update.lora_B.grad is not None
        rows = x.gathered()
        a, b = (each.detach().to(d_rows.dtype) for each in (update.lora_A, update.lora_B))
        d_low = products.backward(d_rows, b, groups).mul_(update.scale)
        products.add_gradient(update.lora_B.grad, d_rows, low, groups, update.scale)
        products.add_gradient(update.lora_A.grad, d_low, rows * masks[0] if masks else rows, groups, 1.0)
        d_inputs = products.backward(d_low, a, groups)
        return d_x.add_(d_inputs * masks[0] if masks else d_inputs)

    def frozen_forward(self, rows: Tensor, groups: Groups) -> Tensor:
        """Return the products with the frozen matrices."""
        return self._products.forward(rows, self.weight, groups)

    def frozen_backward(self, d_rows: Tensor, groups: Groups) -> Tensor:
        """Return the gradient of the input of `frozen_forward`."""
        return self._products.backward(d_rows, self.weight, groups)
