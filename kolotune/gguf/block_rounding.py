"""Round some columns of a matrix to ggml's blocks, with each column's error made good by those still to come.

When a block's turn comes, ggml chooses its scales for the weights as they are compensated until then; then its columns
are rounded to the levels that these scales give. `feedback_kernel.cpp` does it where it can be compiled, else PyTorch a
column at a time. Both round alike, but for the order in which fp32 errors are added up.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.hardware import cores
from kolotune.llamacpp import ggml
from kolotune.runners.native_libraries import NativeLibrary

from . import header
from .block_layouts import block_layouts
from .stored_values import dequantized

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LIBRARY = NativeLibrary(
    Path(__file__).with_name("feedback_kernel.cpp"), "rounding with feedback", "PyTorch rounds without it"
)
_TOGETHER = 32  # columns that PyTorch rounds before what their errors do to the others is computed, all at once
_STRIP = 32  # rows that the kernel rounds at a time: `ROWS` there
_PIECES = 4  # of the rows, for each core, so that none waits long for the others


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix while it is rounded.

    Attributes:
        kind: name of the type.
        importance: of its columns, fp32 ``[columns]``.
        blocks: their scales, and at the end their quants, uint8 ``[blocks of a row, rows, bytes]``.
        quants: uint8 ``[blocks of a row, rows, weights]``.
    """

    kind: str
    importance: np.ndarray
    blocks: np.ndarray
    quants: np.ndarray

    @classmethod
    def empty(cls, rows: int, kind: str, importance: np.ndarray) -> RoundedMatrix:
        """Return one of which nothing is rounded."""
        import numpy as np

        width, size = header.block_of(kind)
        count = len(importance) // width
        shapes = (count, rows, size), (count, rows, width)
        return cls(kind, importance, *(np.zeros(shape, np.uint8) for shape in shapes))

    def finished(self) -> np.ndarray:
        """Return the blocks with their quants, uint8 ``[rows, bytes of a row]``."""
        import numpy as np

        count, rows, size = self.blocks.shape
        blocks = self.blocks.reshape(-1, size)
        block_layouts()[self.kind].write(blocks, self.quants.reshape(len(blocks), -1))
        return np.ascontiguousarray(blocks.reshape(count, rows, size).transpose(1, 0, 2)).reshape(rows, -1)


class ColumnRounding(Protocol):
    """Rounds columns that are whole blocks."""

    def round(self, places: np.ndarray, weights: Tensor, wanted: Tensor, factor: Tensor, errors: Tensor) -> None:
        """Round the columns from the last to the first, each with the errors of those behind it.

        Args:
            places: which of the matrix's columns they are, int64 ``[columns]``.
            weights: fp32 ``[columns, rows]``, with the errors of columns behind all of these; may be changed.
            wanted: the same without them.
            factor: how much of an error behind a column it makes good, fp32 ``[behind, columns]``.
            errors: receives what is wanted but not reached, fp32 ``[columns, rows]``.
        """


def column_rounding(matrix: RoundedMatrix) -> ColumnRounding:
    """Return what rounds the columns of a matrix fastest here."""
    kernel = feedback_kernel()
    return PlainRounding(matrix) if kernel is None else CompiledRounding(kernel, matrix)


@functools.cache
def feedback_kernel() -> Any:
    """Return the compiled kernel; None where it can't be compiled or loaded."""
    try:
        library = ctypes.CDLL(str(LIBRARY.ensure()))
    except (ToolchainError, OSError):
        return None
    library.memory_needed.restype = ctypes.c_int64
    library.round_columns.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p]
    library.round_columns.restype = None
    return library


class _Type(ctypes.Structure):
    """`Type` of the kernel."""

    _fields_ = (
        ("quantize", ctypes.c_void_p), ("widen", ctypes.c_void_p), ("keeps", ctypes.c_void_p),
        ("patterns", ctypes.c_void_p), ("number", ctypes.c_int64), ("width", ctypes.c_int64),
        ("size", ctypes.c_int64), ("levels", ctypes.c_int64), ("is_linear", ctypes.c_int64),
    )  # fmt: skip


class _Columns(ctypes.Structure):
    """`Columns` of the kernel."""

    _fields_ = (
        ("weights", ctypes.c_void_p), ("wanted", ctypes.c_void_p), ("factor", ctypes.c_void_p),
        ("importance", ctypes.c_void_p), ("places", ctypes.c_void_p), ("errors", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p), ("quants", ctypes.c_void_p), ("count", ctypes.c_int64), ("rows", ctypes.c_int64),
    )  # fmt: skip


class CompiledRounding:
    """`ColumnRounding` by the kernel, some rows for each thread.

    Args:
        kernel: see `feedback_kernel`.
        matrix: receives blocks and quants.
    """

    def __init__(self, kernel: Any, matrix: RoundedMatrix) -> None:
        import numpy as np

        layout, (width, size) = block_layouts()[matrix.kind], header.block_of(matrix.kind)
        last = layout.levels - 1
        quants = (0, last) if layout.is_linear else range(layout.levels)
        self._patterns = np.zeros((len(quants), size), np.uint8)
        layout.write(self._patterns, np.repeat(np.array(quants, np.uint8)[:, None], width, axis=1))
        first, every = (np.full((1, size), filled, np.uint8) for filled in (0, 255))
        for blocks in (first, every):
            layout.write(blocks, np.zeros((1, width), np.uint8))
        self._keeps = first ^ every  # what writing quants leaves as it was
        number = header.type_number(matrix.kind)
        functions = ggml.library().ggml_quantize_chunk, ggml.library().ggml_get_type_traits(number).contents.to_float
        self._type = _Type(
            *(ctypes.cast(function, ctypes.c_void_p).value for function in functions),
            self._keeps.ctypes.data, self._patterns.ctypes.data, number, width, size, layout.levels, layout.is_linear,
        )  # fmt: skip
        self._memory_needed = kernel.memory_needed(ctypes.byref(self._type))
        self._kernel, self._matrix = kernel, matrix

    def round(self, places: np.ndarray, weights: Tensor, wanted: Tensor, factor: Tensor, errors: Tensor) -> None:
        import numpy as np

        matrix, behind, rows = self._matrix, factor.T.contiguous(), weights.shape[1]
        assert weights.is_contiguous() and wanted.is_contiguous() and errors.is_contiguous()
        columns = _Columns(
            weights.data_ptr(), wanted.data_ptr(), behind.data_ptr(), matrix.importance.ctypes.data,
            places.ctypes.data, errors.data_ptr(), matrix.blocks.ctypes.data, matrix.quants.ctypes.data,
            len(places), rows,
        )  # fmt: skip

        def round_rows(first: int) -> None:
            memory = np.zeros(self._memory_needed, np.uint8)
            references = ctypes.byref(self._type), ctypes.byref(columns)
            self._kernel.round_columns(*references, first, min(first + step, rows), memory.ctypes.data)

        step = -(-rows // (cores() * _PIECES * _STRIP)) * _STRIP
        _in_threads(round_rows, rows, step)


class PlainRounding:
    """`ColumnRounding` by PyTorch.

    Args:
        matrix: receives blocks and quants.
    """

    def __init__(self, matrix: RoundedMatrix) -> None:
        self._matrix = matrix

    def round(self, places: np.ndarray, weights: Tensor, wanted: Tensor, factor: Tensor, errors: Tensor) -> None:
        width, _ = header.block_of(self._matrix.kind)
        for start in reversed(range(0, len(places), width)):
            here, end = slice(start, start + width), start + width
            weights[here].addmm_(factor[end:, here].T, errors[end:])
            _Block(self._matrix, places[here], weights[here]).round(
                weights[here], wanted[here], factor[here, here], errors[here]
            )


class _Block:
    """One block of each row: its scales by ggml, and its quants as they are rounded.

    Args:
        matrix: receives them.
        places: which of the matrix's columns are in the block, in the order of rounding.
        weights: fp32 ``[width, rows]``, as they are compensated so far.
    """

    def __init__(self, matrix: RoundedMatrix, places: np.ndarray, weights: Tensor) -> None:
        import numpy as np
        import torch

        width, _ = weights.shape
        self._kind, self._layout, number = matrix.kind, block_layouts()[matrix.kind], places[0] // width
        self._order = places % width
        self._blocks, self._quants = matrix.blocks[number], matrix.quants[number]
        natural = np.ascontiguousarray(weights[self._order.argsort()].T.numpy())
        _quantize(natural, self._kind, matrix.importance[number * width :], self._blocks)
        last = self._layout.levels - 1
        if self._layout.is_linear:
            lowest = self._level(0)
            step = (self._level(last) - lowest) / last
            inverse = torch.where(step == 0, 0.0, 1 / step)
            self._of_columns = [each.unbind() for each in (-lowest * inverse, inverse, lowest, step)]
        else:
            self._levels = torch.stack([self._level(quant) for quant in range(self._layout.levels)])

    def _level(self, quant: int) -> Tensor:
        """The value of a quant in each place, in the order of rounding, ``[width, rows]``."""
        import numpy as np
        import torch

        blocks = self._blocks.copy()
        self._layout.write(blocks, np.full((len(blocks), len(self._order)), quant, np.uint8))
        return torch.from_numpy(dequantized(blocks.reshape(-1), self._kind).reshape(len(blocks), -1)).T[self._order]

    def round(self, weights: Tensor, wanted: Tensor, factor: Tensor, errors: Tensor) -> None:
        """Round its columns; see `ColumnRounding.round`."""
        import torch

        by_column, errors_of_rows = factor.T.contiguous(), errors.T
        columns = list(zip(weights.unbind(), wanted.unbind(), errors.unbind(), strict=True))
        for first in reversed(range(0, len(weights), _TOGETHER)):
            last = min(first + _TOGETHER, len(weights))
            weights[first:last].addmm_(by_column[first:last, last:], errors[last:])
            for column in reversed(range(first, last)):
                compensated, exact, error = columns[column]
                behind = slice(column + 1, last)
                compensated.addmv_(errors_of_rows[:, behind], by_column[column, behind])
                torch.sub(exact, self._round(column, compensated), out=error)

    def _round(self, column: int, weights: Tensor) -> Tensor:
        """Round a column to its levels, and return them."""
        import torch

        if self._layout.is_linear:
            shift, inverse, lowest, step = (each[column] for each in self._of_columns)
            quants = torch.addcmul(shift, weights, inverse).round_().clamp_(0, self._layout.levels - 1)
            values = torch.addcmul(lowest, quants, step)
        else:
            quants = (self._levels[:, column] - weights).abs_().argmin(dim=0)
            values = self._levels[:, column].gather(0, quants[None])[0]
        self._quants[:, self._order[column]] = quants.numpy()
        return values


def _quantize(weights: np.ndarray, kind: str, importance: np.ndarray, blocks: np.ndarray) -> None:
    """Have ggml make the blocks of weights ``[rows, width]``, uint8 ``[rows, bytes]``, with all cores."""
    rows, width = weights.shape
    quantize, number = ggml.library().ggml_quantize_chunk, header.type_number(kind)

    def quantize_rows(first: int) -> None:
        some, into = weights[first : first + step], blocks[first : first + step]
        quantize(number, some.ctypes.data, into.ctypes.data, 0, len(some), width, importance.ctypes.data)

    step = -(-rows // cores())
    _in_threads(quantize_rows, rows, step)


def _in_threads(task: Callable[[int], None], rows: int, step: int) -> None:
    """Call a task with the first of each `step` rows, on all cores."""
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(task, range(0, rows, step)))
