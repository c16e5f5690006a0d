"""Rotary position embedding (Su et al., "RoFormer", 2021) for one packed sequence."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """The rotation of each token's queries and keys.

    Attributes:
        cosine, sine: fp32 ``[tokens, width / 2]``, scaled so that the product of a query and a key is the score.
        dtype: of queries and keys.
    """

    cosine: Tensor
    sine: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotary:
        """Compute the rotation at int64 ``positions [tokens]``, with fp32 ``frequencies [width / 2]``."""
        angles = positions[:, None].float() * frequencies
        # Attention divides scores by the root of the width; query and key share that factor equally.
        scale = (2 * len(frequencies)) ** -0.25
        return cls(angles.cos() * scale, angles.sin() * scale, dtype)

    @cached_property
    def _rounded(self) -> tuple[Tensor, Tensor]:
        return self.cosine.to(self.dtype)[:, None], self.sine.to(self.dtype)[:, None]

    def rotate(self, x: Tensor, out: Tensor) -> None:
        """Rotate ``x [tokens, heads, width]`` into `out`."""
        self._rotate(x, out, 1)

    def rotate_back(self, gradient: Tensor, out: Tensor) -> None:
        """Compute the gradient of the input of `rotate` from that of its output."""
        self._rotate(gradient, out, -1)

    def _rotate(self, x: Tensor, out: Tensor, direction: int) -> None:
        cosine, sine = self._rounded
        left, right = x.chunk(2, -1)
        out_left, out_right = out.chunk(2, -1)
        torch.mul(left, cosine, out=out_left).addcmul_(right, sine, value=-direction)
        torch.mul(right, cosine, out=out_right).addcmul_(left, sine, value=direction)
