"""Several linear layers over one input, with their adapters, as one matrix product.

The layers' weights stand below each other, and each adapter's B stands beside its layer's rows, so that
``[x, s A x] · [W, B]ᵀ`` is the whole result: a product with a few columns more in place of three products and two
sums. Backwards the same product gives the gradient of A x along with that of x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .lora import FlatAdapters, LoraPair
from .operations import Operations
from .products import InputGradient


class FusedLinear:
    """Frozen linear layers over one input, and the adapters beside them.

    Args:
        operations: how products are computed.
        weights: each layer's ``[out, in]``, in the dtype that is computed in.
        biases: each layer's ``[out]``, or None.
        pairs: each layer's adapter, or None.
    """

    def __init__(
        self,
        operations: Operations,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        pairs: Sequence[LoraPair | None],
    ) -> None:
        self.inputs = weights[0].shape[1]
        self.outputs = sum(len(each) for each in weights)
        self.rank = sum(len(pair.lora_A) for pair in pairs if pair is not None)
        whole = weights[0].new_zeros(self.outputs, self.inputs + self.rank)
        self.down = weights[0].new_zeros(self.rank, self.inputs)
        self._a = self._a_gradient = self.down  # until `join`
        self.bias: Tensor | None = None
        if any(each is not None for each in biases):
            parts = [weight.new_zeros(len(weight)) if bias is None else bias
                     for weight, bias in zip(weights, biases, strict=True)]  # fmt: skip
            self.bias = torch.cat(parts)
        # Of one scale, since rank and alpha are those of the whole job.
        self.parts: list[tuple[LoraPair, slice, slice]] = []
        row = column = 0
        for weight, pair in zip(weights, pairs, strict=True):
            rows = slice(row, row + len(weight))
            whole[rows, : self.inputs] = weight
            row = rows.stop
            if pair is not None:
                self.parts.append((pair, rows, slice(column, column + len(pair.lora_A))))
                column += len(pair.lora_A)
        self._operations = operations
        self._drops = any(pair.dropout for pair, _, _ in self.parts)
        self._product = operations.product(whole, self.inputs)

    def join(self, flat: FlatAdapters) -> None:
        """Finds the adapters in the row that they have become parts of; their A stand there behind each other."""
        if self.parts:
            first = self.parts[0][0].lora_A
            place = slice(first.storage_offset(), first.storage_offset() + self.down.numel())
            assert flat.parameter.grad is not None
            self._a = flat.parameter.detach()[place].view_as(self.down)
            self._a_gradient = flat.parameter.grad[place].view_as(self.down)

    def refresh(self) -> None:
        """Takes the adapters as they stand now; called after each change of them."""
        if self.parts:
            torch.mul(self._a, self.parts[0][0].scale, out=self.down)
        for pair, rows, columns in self.parts:
            places = slice(self.inputs + columns.start, self.inputs + columns.stop)
            self._product.replace(rows, places, pair.lora_B.detach())

    def room(self, tokens: int) -> Tensor:
        """An input to be filled by the caller in its first `inputs` columns: ``[tokens, inputs + rank]``."""
        return self.down.new_empty(tokens, self.inputs + self.rank)

    def forward(self, x: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """``[tokens, inputs + rank]`` to ``[tokens, outputs]``.

        Args:
            x: from `room`, filled; the rest is filled here.
            masks: in training with dropout, a list that takes what `backward` needs of it.
        """
        given, low = x[:, : self.inputs], x[:, self.inputs :]
        if masks is None or not self._drops:
            self._operations.lower(given, self.down, low)
        else:
            for pair, _, columns in self.parts:
                masks.append(nn.functional.dropout(torch.ones_like(given), pair.dropout))
                low[:, columns] = (given * masks[-1]) @ self.down[columns].t()
        return self._product.forward(x, self.bias)

    def backward(self, d_out: Tensor, x: Tensor, masks: list[Tensor] | None = None) -> InputGradient:
        """Adds to the adapters' gradients; returns the input's.

        Args:
            d_out: the output's gradient, ``[tokens, outputs]``.
            x: what `forward` was given, and has filled.
            masks: what `forward` noted.
        """
        d_x = self._product.backward(d_out)
        if not self.parts:
            return InputGradient(d_x, self.inputs, None)
        self._add_gradients(d_out, d_x[:, self.inputs :], x, masks)
        if not masks:
            return InputGradient(d_x, self.inputs, self.down)
        d_given, d_low = d_x[:, : self.inputs], d_x[:, self.inputs :]
        for (_, _, columns), mask in zip(self.parts, masks, strict=True):
            d_given += (d_low[:, columns] @ self.down[columns]) * mask
        return InputGradient(d_x, self.inputs, None)

    def backward_of_frozen(self, d_out: Tensor, x: Tensor, masks: list[Tensor] | None = None) -> None:
        """As `backward`, where nobody needs the gradient of the input."""
        if self.parts:
            parts = [d_out[:, rows] @ pair.lora_B.detach().to(d_out.dtype) for pair, rows, _ in self.parts]
            self._add_gradients(d_out, torch.cat(parts, 1), x, masks)

    def _add_gradients(self, d_out: Tensor, d_low: Tensor, x: Tensor, masks: list[Tensor] | None) -> None:
        """Adds to the adapters' gradients; `d_low` is that of ``A x``, ``[tokens, rank]``."""
        given, low, add = x[:, : self.inputs], x[:, self.inputs :], self._operations.add_product
        for pair, rows, columns in self.parts:
            assert pair.lora_B.grad is not None
            add(pair.lora_B.grad, d_out[:, rows], low[:, columns], 1.0)
        scale = self.parts[0][0].scale
        if not masks:
            add(self._a_gradient, d_low, given, scale)
            return
        for (_, _, columns), mask in zip(self.parts, masks, strict=True):
            add(self._a_gradient[columns], d_low[:, columns], given * mask, scale)
