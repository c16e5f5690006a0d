"""Round a matrix into ggml's blocks column by column, with each column's error made good by the columns still to come.

The algorithm is GPTQ (Frantar et al. 2022, arXiv:2210.17323), in the form that takes errors from one Cholesky factor of
the inputs' Hessian, without its inverse, and begins at the last column (LDLQ in Chee et al. 2023, arXiv:2307.13304,
where both are shown to be the same). For blocks that have scales: when a block's turn comes, ggml chooses its scales
for the weights as they are compensated until then, weighed by the inputs; then its columns are rounded to the levels
that these scales give.

The inputs are those that the rounded matrices before it give. Where the exact ones are known too, what is rounded is
the matrix that comes closest to the exact outputs from the inputs it gets, in the damped least squares' sense, so that
it also makes good what was lost before it (as in Li et al. 2025, "GPTAQ", arXiv:2504.02692, there within the feedback).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import header
from .block_layouts import block_layouts
from .block_rounding import RoundedMatrix, column_rounding
from .stored_values import dequantized

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_DAMPING = 0.02  # of the mean of the Hessian's diagonal
_RESTORATION_DAMPING = 0.1  # the same, where lost inputs are predicted: with less, other texts gain less
_MORE_DAMPING = 10.0  # where that is not enough for a decomposition
_LEAST_IMPORTANCE = 1e-4  # of the mean: a column without inputs still has to get some value
_PANEL = 128  # columns that are rounded before what their errors do to the others is computed, all at once
_GROUPS = (32, 256)  # columns that are rounded together, since each type's blocks are as long
_STRIPS = 4  # of a Hessian, each computed from the diagonal on: it is symmetric


@dataclass(frozen=True)
class InputStatistics:
    """What rounding has to know of the inputs of a matrix.

    Attributes:
        hessian: mean products of the columns, fp32 ``[columns, columns]``.
        order: which columns are rounded, from last to first: column ``order[i]`` is the i-th, int64 ``[columns]``.
        factor: lower Cholesky factor of the damped Hessian in this order, its columns divided by their diagonal, fp32
            ``[columns, columns]``.
        importance: mean square of each column's inputs, fp32 ``[columns]``.
        restoration: predicts from the inputs what they have lost, by damped least squares, fp32
            ``[columns, columns]``; None where the exact ones are not known.
    """

    hessian: Tensor
    order: np.ndarray
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
    import torch

    hessian = _hessian(inputs)
    diagonal = hessian.diagonal()
    importance = diagonal.clamp(min=_LEAST_IMPORTANCE * _mean(diagonal)).numpy()
    restoration = None
    if exact is not None:
        lower, _ = _decomposed(hessian, _RESTORATION_DAMPING * _mean(diagonal))
        restoration = torch.cholesky_solve(inputs.T @ (exact - inputs) / len(inputs), lower)
    order = _order(importance)
    columns = torch.from_numpy(order)
    ordered = hessian[columns[:, None], columns]
    lower, _ = _decomposed(ordered, _DAMPING * _mean(diagonal))
    lower /= lower.diagonal().clone()
    return InputStatistics(hessian, order, lower, importance, restoration)


def _mean(diagonal: Tensor) -> float:
    """Return the mean square of the inputs of a column that gets any; 1 where none does."""
    return float(diagonal[diagonal > 0].mean()) if float(diagonal.max()) > 0 else 1.0


def _order(importance: np.ndarray) -> np.ndarray:
    """Return the columns by importance, least first; whole superblocks, in them whole blocks, in them columns."""
    import numpy as np

    keys = [importance]  # the last one counts most
    for size in _GROUPS:
        if len(importance) % size == 0:
            means = importance.reshape(-1, size).mean(axis=1)
            keys += [np.repeat(np.arange(len(means)), size), np.repeat(means, size)]
    return np.lexsort(keys)


def restored_weight(weight: Tensor, inputs: Tensor, outputs: Tensor, statistics: InputStatistics) -> Tensor:
    """Return the matrix that comes closest to the exact outputs; for few rows this is less work than a restoration.

    Args:
        weight: fp32 ``[rows, columns]``, from which it is kept by damping.
        inputs: what goes into it, fp32 ``[inputs, columns]``.
        outputs: what it gave, without a bias, if nothing before it were rounded, fp32 ``[inputs, rows]``.
        statistics: of the inputs.
    """
    import torch

    hessian = statistics.hessian
    lower, damping = _decomposed(hessian, _RESTORATION_DAMPING * _mean(hessian.diagonal()))
    return torch.cholesky_solve(inputs.T @ outputs / len(inputs) + damping * weight.T, lower).T


def _hessian(inputs: Tensor) -> Tensor:
    import torch

    columns = inputs.shape[1]
    hessian = torch.empty(columns, columns)
    for start in range(0, columns, step := -(-columns // _STRIPS)):
        strip = slice(start, start + step)
        hessian[strip, start:] = inputs[:, strip].T @ inputs[:, start:]
        hessian[start:, strip] = hessian[strip, start:].T
    hessian /= len(inputs)
    return hessian


def _decomposed(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the lower Cholesky factor of a damped Hessian, and the damping: ten times more until there is a factor."""
    import torch

    diagonal = hessian.diagonal().clone()
    try:
        while True:
            hessian.diagonal().copy_(diagonal + damping)
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                return lower, damping
            damping *= _MORE_DAMPING
    finally:
        hessian.diagonal().copy_(diagonal)


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

    width, _ = header.block_of(kind)
    rows, columns = weight.shape
    wanted = weight.T.contiguous()  # [columns, rows]: a column is one piece of memory
    if statistics.restoration is not None:
        wanted += statistics.restoration @ wanted
    order, factor, panel = statistics.order, statistics.factor, max(width, _PANEL)
    wanted = wanted[order]
    errors = torch.empty_like(wanted)
    matrix = RoundedMatrix.empty(rows, kind, statistics.importance)
    rounding = column_rounding(matrix)
    for first in reversed(range(0, columns, panel)):
        last = min(first + panel, columns)
        here = slice(first, last)
        compensated = wanted[here] + factor[last:, here].T @ errors[last:]
        rounding.round(order[here], compensated, wanted[here], factor[here, here], errors[here])
    blocks = matrix.finished()
    return blocks, torch.from_numpy(dequantized(blocks.reshape(-1), kind).reshape(rows, columns))
