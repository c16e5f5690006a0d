"""What a LoRA adapter adds to one weight, computed some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .initial_matrices import Initial, taken_out

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
        lengths: the length that they have without it, where the weight's rows are not the outputs; see `completed`.
        initial: what the update started as, if the base was reduced by that; see `completed`.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool
    magnitude: np.ndarray | None = None
    lengths: np.ndarray | None = None
    initial: Initial | None = None

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

    @property
    def is_complete(self) -> bool:
        """Whether it can be added to a block of rows without the others."""
        return self.initial is None and (self.magnitude is None or not self.transposed or self.lengths is not None)

    def completed(self, blocks: Callable[[], Iterable[tuple[slice, np.ndarray]]]) -> Delta:
        """Return the same update with all that has to be known of the whole base weight.

        Args:
            blocks: returns all rows of the base weight, fp32.
        """
        import numpy as np

        if self.initial is not None:
            weight = np.concatenate([values for _, values in blocks()])
            left, right = taken_out(self.initial, weight.T if self.transposed else weight, len(self.a), self.scale)
            a, b = np.concatenate([self.a, right]), np.concatenate([self.b * np.float32(self.scale), -left], axis=1)
            return replace(self, a=a, b=b, scale=1.0, initial=None).completed(blocks)
        if self.is_complete:
            return self
        squares = np.zeros(self.shape[1])
        for rows, values in blocks():
            squares += np.square(self.rows(rows) + values, dtype=np.float64).sum(axis=0)
        return replace(self, lengths=np.sqrt(squares).astype(np.float32))


@dataclass(frozen=True)
class ExpertDelta:
    """The low-rank updates of all experts of a layer, whose weights are one tensor.

    Attributes:
        a: ``[experts, rank, in]``, fp32.
        b: ``[experts, out, rank]``, fp32.
        scale: factor of the products.
        transposed: whether the weight is stored ``[experts, in, out]``.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the weight."""
        return (len(self.a), *self.expert(0).shape)

    @property
    def is_complete(self) -> bool:
        """See `Delta`."""
        return True

    def expert(self, index: int, outputs: slice = slice(None)) -> Delta:
        """Return the update of one expert, or of some of its outputs."""
        return Delta(self.a[index], self.b[index][outputs], self.scale, self.transposed)

    def added_to(self, values: np.ndarray, rows: slice) -> np.ndarray:
        """Return the updated weights of some experts, given those of the base, fp32."""
        import numpy as np

        whole = slice(None)
        experts = range(*rows.indices(len(self.a)))
        return np.stack([self.expert(index).added_to(values[index - rows.start], whole) for index in experts])
