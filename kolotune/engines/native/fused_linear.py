"""Several linear layers over one input, with their adapters, as one matrix product.

The layers' weights are stacked, with each adapter's B beside its layer's rows. ``[x, s A x] · [W, B]ᵀ`` is the whole
result: one product with a few more columns, instead of three products and two sums. In the backward pass the same
product yields the gradient of A x along with that of x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .dora import Magnitudes, row_squares
from .lora import FlatAdapters, LoraPair
from .matrix_product import DequantizedProduct, InputGradient, Product
from .operations import Operations


class FusedLinear:
    """Frozen linear layers over one input, and the adapters beside them.

    Args:
        operations: computes the adapters' products.
        weights: each layer's ``[out, in]``, in the dtype of the computation, or in bf16 where `operations` widens them.
        biases: each layer's ``[out]``, or None.
        pairs: each layer's adapter, or None.
        product: as `Operations.product`, which None stands for.
    """

    def __init__(
        self,
        operations: Operations,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        pairs: Sequence[LoraPair | None],
        product: Callable[[Tensor, int], Product] | None = None,
    ) -> None:
        self.inputs = weights[0].shape[1]
        self.outputs = sum(map(len, weights))
        self.rank = sum(len(pair.lora_A) for pair in pairs if pair is not None)
        kept = functools.reduce(torch.promote_types, (weight.dtype for weight in weights))
        whole = weights[0].new_zeros(self.outputs, self.inputs + self.rank, dtype=kept)
        self.down = whole.new_zeros(self.rank, self.inputs, dtype=torch.float32 if operations.widens else kept)
        self._a = self._a_gradient = self.down  # until `join`
        self.bias: Tensor | None = None
        if any(bias is not None for bias in biases):
            parts = [self.down.new_zeros(len(weight)) if bias is None else bias
                     for weight, bias in zip(weights, biases, strict=True)]  # fmt: skip
            self.bias = torch.cat(parts)
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
        scales = [pair.scale for pair, _, _ in self.parts]
        self._scale = scales[0] if len(set(scales)) == 1 else None  # one operation for all of A, where it is the same
        self._drops = any(pair.dropout for pair, _, _ in self.parts)
        self._product = (product or operations.product)(whole, self.inputs)
        self._magnitudes: Magnitudes | None = None
        if any(pair.lora_magnitude_vector is not None for pair, _, _ in self.parts):
            frozen = (
                self._product.dequantize() if isinstance(self._product, DequantizedProduct) else whole[:, : self.inputs]
            )
            self._magnitudes = Magnitudes(self.parts, row_squares(frozen), whole.dtype)

    def join(self, flat: FlatAdapters) -> None:
        """Read the adapters from the flat tensor, in which their A follow each other."""
        if self.parts:
            first = self.parts[0][0].lora_A
            span = slice(first.storage_offset(), first.storage_offset() + self.down.numel())
            assert flat.parameter.grad is not None
            self._a = flat.parameter.detach()[span].view_as(self.down)
            self._a_gradient = flat.parameter.grad[span].view_as(self.down)

    def refresh(self) -> None:
        """Take over the current values of the adapters; called after each change."""
        if self._scale is not None:
            torch.mul(self._a, self._scale, out=self.down)
        for pair, rows, columns in self.parts:
            if self._scale is None:
                torch.mul(self._a[columns], pair.scale, out=self.down[columns])
            added = slice(self.inputs + columns.start, self.inputs + columns.stop)
            self._product.replace(rows, added, pair.lora_B.detach())
        if self._magnitudes is not None:
            rows_of_a = self.new_input(self.rank)
            rows_of_a[:, : self.inputs] = self.down
            self._magnitudes.refresh(self._product.forward(rows_of_a, None), self.down)

    def reset(self) -> None:
        """Give the adapters' magnitudes, if they have some, the values with which they change nothing."""
        if self._magnitudes is not None:
            self._magnitudes.reset()

    def new_input(self, tokens: int) -> Tensor:
        """Allocate an input ``[tokens, inputs + rank]``, of which the caller fills the first `inputs` columns.

        The others are 0: PyTorch's bf16 products read some numbers behind a row whose width is no multiple of 32, and
        multiply them by 0. Of what memory held before, one that is no number would stay none.
        """
        result = self.down.new_empty(tokens, self.inputs + self.rank)
        result[:, self.inputs :] = 0
        return result

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Compute ``[tokens, outputs]`` from ``[tokens, inputs + rank]``.

        Args:
            x: from `new_input`; its last `rank` columns are filled here.
            kept: in training, a list that receives what `backward` needs besides: the masks of dropout, or the outputs
                before they are scaled to their magnitudes.
        """
        inputs, low = x[:, : self.inputs], x[:, self.inputs :]
        if kept is None or not self._drops:
            self._operations.lower(inputs, self.down, low)
        else:
            for pair, _, columns in self.parts:
                kept.append(nn.functional.dropout(torch.ones_like(inputs), pair.dropout))
                low[:, columns] = (inputs * kept[-1]) @ self.down[columns].t()
        if self._magnitudes is None:
            return self._product.forward(x, self.bias)
        out = self._product.forward(x, None)
        if kept is not None:
            kept.append(out)
        scaled = self._magnitudes.forward(out)
        return scaled if self.bias is None else scaled.add_(self.bias)

    def backward(self, d_out: Tensor, x: Tensor, kept: list[Tensor] | None = None) -> InputGradient:
        """Add to the adapters' gradients; return the input's.

        Args:
            d_out: the output's gradient, ``[tokens, outputs]``.
            x: the input of `forward`.
            kept: from `forward`.
        """
        d_out, masks = self._unscaled(d_out, kept)
        d_x = self._product.backward(d_out)
        if not self.parts:
            return InputGradient(d_x, self.inputs, None)
        self._add_gradients(d_out, d_x[:, self.inputs :], x, masks)
        if not masks:
            return InputGradient(d_x, self.inputs, self.down)
        d_inputs, d_low = d_x[:, : self.inputs], d_x[:, self.inputs :]
        for (_, _, columns), mask in zip(self.parts, masks, strict=True):
            d_inputs += (d_low[:, columns] @ self.down[columns]) * mask
        return InputGradient(d_x, self.inputs, None)

    def backward_of_frozen(self, d_out: Tensor, x: Tensor, kept: list[Tensor] | None = None) -> None:
        """Like `backward`, without the gradient of the input."""
        if self.parts:
            d_out, masks = self._unscaled(d_out, kept)
            parts = [d_out[:, rows] @ pair.lora_B.detach().to(d_out.dtype) for pair, rows, _ in self.parts]
            self._add_gradients(d_out, torch.cat(parts, 1), x, masks)

    def _unscaled(self, d_out: Tensor, kept: list[Tensor] | None) -> tuple[Tensor, list[Tensor] | None]:
        """Return the gradient before the outputs are scaled, and the masks of dropout."""
        if self._magnitudes is None or not kept:
            return d_out, kept
        return self._magnitudes.backward(d_out, kept[-1]), kept[:-1]

    def _add_gradients(self, d_out: Tensor, d_low: Tensor, x: Tensor, masks: list[Tensor] | None) -> None:
        """Add to the adapters' gradients; `d_low` is the gradient of ``A x``, ``[tokens, rank]``."""
        inputs, low, add = x[:, : self.inputs], x[:, self.inputs :], self._operations.add_product
        for pair, rows, columns in self.parts:
            assert pair.lora_B.grad is not None
            add(pair.lora_B.grad, d_out[:, rows], low[:, columns], 1.0)
        if not masks and self._scale is not None:
            add(self._a_gradient, d_low, inputs, self._scale)
            return
        for at, (pair, _, columns) in enumerate(self.parts):
            dropped = inputs * masks[at] if masks else inputs
            add(self._a_gradient[columns], d_low[:, columns], dropped, pair.scale)
