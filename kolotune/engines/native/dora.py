"""DoRA: the weights of each output have a trained length, the magnitude, and a direction that LoRA changes.

A layer computes ``magnitude * (W + s B A) x / length(W + s B A)``. As in PEFT, no gradient flows through the length.
The matrix W + s B A is never computed: the squares of its rows' lengths are those of W, which are known, plus
``2 b · (W (s A)ᵀ)`` and ``b (s A)(s A)ᵀ bᵀ``, which take one product of W with as many rows as the rank.

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

_TINY = torch.finfo(torch.float32).tiny  # so that rows of zeros have the factor 0 and not none


class ScaledAdapter(Protocol):
    """An adapter with magnitudes: B, ``[out, rank]``, and the lengths, ``[out]``."""

    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None


def row_squares(weight: Tensor) -> Tensor:
    """Return the squared lengths of the rows of ``weight [out, in]``, fp32 ``[out]``."""
    return weight.float().square().sum(1)


def adapted_lengths(squares: Tensor, lowered: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the lengths of the rows of ``W + up · down``, fp32 ``[out]``.

    Args:
        squares: of W, fp32 ``[out]``.
        lowered: ``down · Wᵀ``, ``[rank, out]``.
        down: the scaled A, ``[rank, in]``.
        up: B, fp32 ``[out, rank]``.
    """
    exact = down.float()
    crossed = (up * lowered.float().t()).sum(1)
    own = (up @ (exact @ exact.t()) * up).sum(1)
    return (squares + 2 * crossed + own).clamp_(min=_TINY).sqrt_()


class Magnitudes:
    """The factors of the outputs of linear layers that are computed as one.

    Args:
        parts: each adapter, its rows of the outputs, and its rows of `down` in `refresh`.
        squares: of the frozen weights' rows, fp32 ``[outputs]``.
        dtype: of the computation.
    """

    def __init__(
        self, parts: Sequence[tuple[ScaledAdapter, slice, slice]], squares: Tensor, dtype: torch.dtype
    ) -> None:
        self._parts, self._squares = parts, squares
        self._lengths = squares.clamp(min=_TINY).sqrt_()
        # The factor less 1: a factor close to 1 would lose its changes in bf16.
        self._change = torch.zeros_like(squares, dtype=dtype)

    def refresh(self, lowered: Tensor, down: Tensor) -> None:
        """Take over the current values of the adapters.

        Args:
            lowered: the product of `down` with the frozen weights, ``[rank, outputs]``.
            down: the scaled A of all adapters, ``[rank, inputs]``.
        """
        for pair, rows, columns in self._parts:
            self._lengths[rows] = adapted_lengths(
                self._squares[rows], lowered[columns, rows], down[columns], pair.lora_B.detach()
            )
            assert pair.lora_magnitude_vector is not None
            self._change[rows] = pair.lora_magnitude_vector.detach() / self._lengths[rows] - 1

    def reset(self) -> None:
        """Set the magnitudes to the lengths that the weights have, so that they change nothing."""
        for pair, rows, _ in self._parts:
            assert pair.lora_magnitude_vector is not None
            pair.lora_magnitude_vector.detach().copy_(self._lengths[rows])
        self._change.zero_()

    def forward(self, out: Tensor) -> Tensor:
        """Return the scaled outputs, ``[tokens, outputs]``."""
        return torch.addcmul(out, out, self._change)

    def backward(self, d_scaled: Tensor, out: Tensor) -> Tensor:
        """Add to the magnitudes' gradients; return that of ``out``, the input of `forward`."""
        sums = (d_scaled * out).sum(0, dtype=torch.float32) / self._lengths
        for pair, rows, _ in self._parts:
            assert pair.lora_magnitude_vector is not None and pair.lora_magnitude_vector.grad is not None
            pair.lora_magnitude_vector.grad += sums[rows]
        return torch.addcmul(d_scaled, d_scaled, self._change)
