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
        cosine, sine: fp32 ``[tokens, rotated / 2]``, scaled so that the product of a query and a key is the score.
        scale: factor of the numbers of a head behind the rotated ones, for the same reason.
        dtype: of queries and keys.
    """

    cosine: Tensor
    sine: Tensor
    scale: float
    dtype: torch.dtype

    @classmethod
    def of(
        cls, positions: Tensor, frequencies: Tensor, dtype: torch.dtype, scale: float, factor: float = 1.0
    ) -> Rotary:
        """Compute the rotation at int64 ``positions [tokens]``.

        Args:
            positions: of the tokens.
            frequencies: fp32 ``[rotated / 2]``: the angles per position of the first `rotated` numbers of a head.
            dtype: of queries and keys.
            scale: factor of both queries and keys: the root of the scores' factor.
            factor: of cosine and sine.
        """
        angles = positions[:, None].float() * frequencies
        return cls(angles.cos() * (scale * factor), angles.sin() * (scale * factor), scale, dtype)

    @property
    def rotated(self) -> int:
        """How many numbers of a head are rotated."""
        return 2 * self.cosine.shape[1]

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
        rotated = self.rotated
        left, right = x[..., :rotated].chunk(2, -1)
        out_left, out_right = out[..., :rotated].chunk(2, -1)
        torch.mul(left, cosine, out=out_left).addcmul_(right, sine, value=-direction)
        torch.mul(right, cosine, out=out_right).addcmul_(left, sine, value=direction)
        if rotated < x.shape[-1]:
            torch.mul(x[..., rotated:], self.scale, out=out[..., rotated:])
