"""What a LoRA adapter adds to one weight, computed some rows at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_ONE_THREAD = 1 << 18  # BLAS computes a product of fewer multiplications in one thread


@dataclass(frozen=True)
class Delta:
    """The low-rank update of a weight.

    Attributes:
        a: ``[rank, in]`` (for embeddings ``[rank, vocabulary]``), fp32.
        b: ``[out, rank]``, fp32.
        scale: factor of the product.
        transposed: whether the weight is stored ``[in, out]``.
        magnitude: the length that each output's weights have in the end (DoRA), ``[out]``; None: they stay as they are.
        lengths: the length that they have without it, where the rows of the weight are not the outputs; see `measured`.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool
    magnitude: np.ndarray | None = None
    lengths: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight."""
        outputs, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, outputs) if self.transposed else (outputs, inputs)

    def rows(self, rows: slice) -> np.ndarray:
        """Return ``scale * B A`` for some rows of the weight, fp32."""
        import numpy as np

        left, right = (self.a.T, self.b.T) if self.transposed else (self.b, self.a)
        left = left[rows]
        count, width = left.shape[0], right.shape[1]
        product = np.empty((count, width), np.float32)
        # A few rows at a time: BLAS would spread a larger product over threads, and several run already.
        step = max(_ONE_THREAD // (width * left.shape[1]), 1)
        whole = count // step * step
        np.matmul(left[:whole].reshape(-1, step, left.shape[1]), right, out=product[:whole].reshape(-1, step, width))
        np.matmul(left[whole:], right, out=product[whole:])
        product *= np.float32(self.scale)
        return product

    def added_to(self, values: np.ndarray, rows: slice) -> np.ndarray:
        """Return some rows of the updated weight, given the rows of the base, fp32."""
        import numpy as np

        values = np.add(product := self.rows(rows), values, out=product)
        if self.magnitude is None:
            return values
        if self.transposed:
            values *= self.magnitude / self.lengths
        else:
            values *= (self.magnitude[rows] / np.linalg.norm(values, axis=1))[:, None]
        return values

    def measured(self, blocks: Iterable[tuple[slice, np.ndarray]]) -> Delta:
        """Return the same update with its `lengths`, if it needs them.

        Args:
            blocks: all rows of the base weight, fp32.
        """
        import numpy as np

        if self.magnitude is None or not self.transposed:
            return self
        squares = np.zeros(self.shape[1])
        for rows, values in blocks:
            squares += np.square(self.rows(rows) + values, dtype=np.float64).sum(axis=0)
        return replace(self, lengths=np.sqrt(squares).astype(np.float32))
