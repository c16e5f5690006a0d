"""Round a matrix into ggml's blocks column by column, with each column's error made good by the columns behind it.

The algorithm is GPTQ (Frantar et al. 2022, arXiv:2210.17323), for blocks that have scales: when a block's turn comes,
ggml chooses its scales for the weights as they are compensated until then, weighed by the inputs; then its columns are
rounded to the levels that these scales give.

The inputs are those that the rounded matrices before it give. Where the exact ones are known too, what is rounded is
the matrix that comes closest to the exact outputs from the inputs it gets, in the damped least squares' sense, so that
it also makes good what was lost before it (as in Li et al. 2025, "GPTAQ", arXiv:2504.02692, there within the feedback).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kolotune.llamacpp import ggml

from . import header
from .block_layouts import BlockLayout, block_layouts
from .stored_values import dequantized

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_RESTORATION_DAMPING = 0.05  # the same, where lost inputs are predicted: with 0.01 other texts gain less
_MORE_DAMPING = 10.0  # where that is not enough for a decomposition
_LEAST_IMPORTANCE = 1e-4  # of the mean: a column without inputs still has to get some value
MOST_IN_DOUBLE = 4096  # columns of a Hessian that is decomposed in fp64; larger ones take too much memory
_COLUMNS = 32  # that are rounded before the columns behind them are compensated, all at once


@dataclass(frozen=True)
class InputStatistics:
    """What rounding has to know of the inputs of a matrix.

    Attributes:
        factor: upper Cholesky factor of the inverse of the damped Hessian, fp32 ``[columns, columns]``.
        importance: mean square of each column's inputs, fp32 ``[columns]``.
        restoration: predicts from the inputs what they have lost, by damped least squares, fp32
            ``[columns, columns]``; None where the exact ones are not known.
    """

    factor: Tensor
    importance: np.ndarray
    restoration: Tensor | None = None


def input_statistics(inputs: Tensor, exact: Tensor | None = None) -> InputStatistics:
    """Return the statistics of the inputs of a matrix.

    A column that is zero in all inputs (a dead one) is rounded by itself: no error reaches it or comes from it.

    Args:
        inputs: what goes into it, fp32 ``[inputs, columns]``.
        exact: what would if nothing before it were rounded; None: not known.
    """
    import numpy as np
    import torch

    hessian = inputs.T @ inputs / len(inputs)
    if len(hessian) <= MOST_IN_DOUBLE:
        hessian = hessian.double()
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal.mean()) or 1.0
    restoration = None if exact is None else _restoration(inputs, exact - inputs, hessian, mean)
    importance = diagonal.clamp(min=_LEAST_IMPORTANCE * mean).float().numpy()
    damping = _DAMPING * mean
    while True:
        damped = hessian + torch.diag(torch.where(diagonal > 0, damping, mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return InputStatistics(factor.float(), np.ascontiguousarray(importance), restoration)
        damping *= _MORE_DAMPING


def _restoration(inputs: Tensor, lost: Tensor, hessian: Tensor, mean: float) -> Tensor:
    """Return what makes the lost part of inputs, ``[inputs, columns]``, from the inputs; `mean` is of the diagonal."""
    import torch

    damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype) * (_RESTORATION_DAMPING * mean)
    products = (inputs.T @ lost / len(inputs)).to(hessian.dtype)
    return torch.cholesky_solve(products, torch.linalg.cholesky(damped)).float()


def is_compensable(kind: str) -> bool:
    """Whether the blocks of a type can be filled with feedback."""
    return kind in block_layouts()


def round_with_feedback(weight: Tensor, kind: str, statistics: InputStatistics) -> tuple[np.ndarray, Tensor]:
    """Round a matrix.

    Args:
        weight: fp32 ``[rows, columns]``, whole blocks.
        kind: name of the blocks' type.
        statistics: of its inputs.

    Returns:
        The blocks, uint8 ``[rows, bytes of a row]``, and their values, fp32 ``[rows, columns]``.
    """
    import torch

    layout, (width, size) = block_layouts()[kind], header.block_of(kind)
    rows, columns = weight.shape
    rest = weight.T.contiguous()  # [columns, rows]: a column is one piece of memory
    if statistics.restoration is not None:
        rest += statistics.restoration @ rest
    values = torch.empty_like(rest)
    blocks = []
    for start in range(0, columns, width):
        end = start + width
        block = _Block(rest[start:end], kind, layout, statistics.importance[start:end])
        errors = block.rounded(rest[start:end], statistics.factor[start:end, start:end])
        rest[end:] -= statistics.factor[start:end, end:].T @ errors
        values[start:end] = block.values
        blocks.append(block.bytes())
    import numpy as np

    return np.concatenate(blocks, axis=1).reshape(rows, columns // width * size), values.T.contiguous()


class _Block:
    """One block of each row: its scales by ggml, and its quants as they are rounded.

    Args:
        weights: fp32 ``[width, rows]``, as they are compensated so far.
        kind: name of the type.
        layout: of its quants.
        importance: of the block's columns.

    Attributes:
        values: what the rounded columns become, fp32 ``[width, rows]``.
    """

    def __init__(self, weights: Tensor, kind: str, layout: BlockLayout, importance: np.ndarray) -> None:
        import numpy as np
        import torch

        width, rows = weights.shape
        ordered = np.ascontiguousarray(weights.T.numpy())
        importance = np.ascontiguousarray(importance)
        self._kind, self._layout = kind, layout
        self._blocks = np.empty((rows, header.size_of((width,), kind)), np.uint8)
        ggml.library().ggml_quantize_chunk(
            header.type_number(kind), ordered.ctypes.data, self._blocks.ctypes.data, 0, rows, width,
            importance.ctypes.data,
        )  # fmt: skip
        self._quants = torch.zeros((width, rows), dtype=torch.uint8)
        self.values = torch.empty((width, rows))
        last = layout.levels - 1
        if layout.is_linear:
            self._first = self._level(0)
            self._step = (self._level(last) - self._first) / last
            self._inverse = torch.where(self._step == 0, 0.0, 1 / self._step)
        else:
            self._levels = torch.stack([self._level(quant) for quant in range(layout.levels)])

    def _level(self, quant: int) -> Tensor:
        """The value of a quant in each place, ``[width, rows]``."""
        import numpy as np
        import torch

        blocks = self._blocks.copy()
        self._layout.write(blocks, np.full((len(blocks), len(self._quants)), quant, np.uint8))
        return torch.from_numpy(
            np.ascontiguousarray(dequantized(blocks.reshape(-1), self._kind).reshape(len(blocks), -1).T)
        )

    def rounded(self, weights: Tensor, factor: Tensor) -> Tensor:
        """Round the columns in order, each with the errors of those before it; return the errors, scaled.

        Args:
            weights: fp32 ``[width, rows]``; changed in place.
            factor: of the block's columns; see `InputStatistics`.
        """
        import torch

        width = len(weights)
        errors = torch.empty_like(weights)
        for first in range(0, width, _COLUMNS):
            last = min(first + _COLUMNS, width)
            for column in range(first, last):
                self._round(column, weights[column])
                errors[column] = (weights[column] - self.values[column]) / factor[column, column]
                weights[column + 1 : last].addr_(factor[column, column + 1 : last], errors[column], alpha=-1)
            weights[last:] -= factor[first:last, last:].T @ errors[first:last]
        return errors

    def _round(self, column: int, weights: Tensor) -> None:
        import torch

        if self._layout.is_linear:
            quants = (
                ((weights - self._first[column]) * self._inverse[column]).round_().clamp_(0, self._layout.levels - 1)
            )
            torch.addcmul(self._first[column], quants, self._step[column], out=self.values[column])
        else:
            quants = (self._levels[:, column] - weights).abs_().argmin(dim=0)
            self.values[column] = self._levels[:, column].gather(0, quants[None])[0]
        self._quants[column] = quants.to(torch.uint8)

    def bytes(self) -> np.ndarray:
        """Return the blocks with the rounded quants, ``[rows, bytes]``."""
        import numpy as np

        self._layout.write(self._blocks, np.ascontiguousarray(self._quants.T.numpy()))
        return self._blocks
