"""Rotary position embedding (Su et al., "RoFormer", 2021) for one packed row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How far each token's queries and keys are turned.

    Attributes:
        cosine, sine: fp32 ``[row, width / 2]``; scaled, so that the product of a query and a key is the score.
        dtype: of queries and keys.
    """

    cosine: Tensor
    sine: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotary:
        """The turns at int64 ``positions [row]``, with fp32 ``frequencies [width / 2]``."""
        angles = positions[:, None].float() * frequencies
        # Scores are divided by the root of the width; here each of the two factors takes half of that.
        scale = (2 * len(frequencies)) ** -0.25
        return cls(angles.cos() * scale, angles.sin() * scale, dtype)

    @cached_property
    def _rounded(self) -> tuple[Tensor, Tensor]:
        return self.cosine.to(self.dtype)[:, None], self.sine.to(self.dtype)[:, None]

    def turn(self, x: Tensor, out: Tensor) -> None:
        """Turns ``x [row, heads, width]`` into `out`."""
        self._rotate(x, out, 1)

    def turn_back(self, gradient: Tensor, out: Tensor) -> None:
        """The gradient of what `turn` was given, from that of what it made."""
        self._rotate(gradient, out, -1)

    def _rotate(self, x: Tensor, out: Tensor, direction: int) -> None:
        cosine, sine = self._rounded
        left, right = x.chunk(2, -1)
        out_left, out_right = out.chunk(2, -1)
        torch.mul(left, cosine, out=out_left).addcmul_(right, sine, value=-direction)
        torch.mul(right, cosine, out=out_right).addcmul_(left, sine, value=direction)
