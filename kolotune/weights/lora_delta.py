"""What a LoRA adapter adds to one weight, computed some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
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
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool

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
