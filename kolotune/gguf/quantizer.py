"""Quantize one GGUF: ``python -m … IN OUT TYPE [MATRIX] [--types FILE]``. A process, because the library may abort.

Rows are read, widened to fp32 and quantized by ggml some at a time, on a thread for each core, and written in order: no
tensor is whole in memory. `tensor_types` says what becomes of each tensor. The file is llama.cpp's, byte for byte.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.files import explained
from kolotune.foundation.hardware import cores
from kolotune.foundation.hashing import HashedFile
from kolotune.foundation.ordered_tasks import results_in_order
from kolotune.llamacpp import ggml
from kolotune.runners import child_process
from kolotune.weights.gguf_metadata import DAMAGED, not_whole

from . import header, importance_matrix
from .header import GgufTensor, HeaderReader
from .quantized_header import ALIGNMENT, quantized_header
from .tensor_types import is_embedding, needs_matrix, tensor_types

if TYPE_CHECKING:
    import numpy as np

    Matrix = Mapping[str, np.ndarray]

WEIGHTS_AT_ONCE = 1 << 18
"""Of a piece: between a millisecond and a quarter of a second of work, by the type."""
_AHEAD = 8
"""Pieces for each thread that wait to be written, so that no thread waits for a slow one or behind small tensors."""
_TYPES = "--types"
_WIDENED = ("F16", "BF16", "F32")
_Task = Callable[[], "np.ndarray | bytes"]


def main(arguments: list[str]) -> int:
    """Quantize, and report the hash of the result; return the exit code."""
    types_file = Path(arguments[-1]) if _TYPES in arguments else None
    source, target, file_type, *matrix = arguments[:-2] if types_file else arguments

    def task() -> None:
        means = importance_matrix.read(Path(matrix[0])) if matrix else {}
        chosen = typed_storage.read(dict[str, str], types_file) if types_file else None
        child_process.emit("written", sha256=quantize(Path(source), Path(target), file_type, means, chosen))

    return child_process.carry_out(task)


def quantize(
    source: Path, target: Path, file_type: str, matrix: Matrix, chosen: Mapping[str, str] | None = None
) -> str:
    """Quantize the file `source` to the file `target`; return the target's hash.

    Args:
        source: an unquantized GGUF.
        target: the GGUF to write.
        file_type: name of the quantization.
        matrix: the importance matrix, as `importance_matrix.read` returns it; empty: without one.
        chosen: types that replace the quantization's own; see `tensor_types`.

    Raises:
        ToolchainError: the quantization does not fit the model, or needs a matrix.
        ArtifactError: the source is damaged, or the matrix belongs to another model.
        SpaceError: the disk is full.
    """
    try:
        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = header.read_whole(data, source)
            types = tensor_types(reader.summary(), file_type, has_matrix=bool(matrix), chosen=chosen)
            content = quantized_header(data, reader, types, file_type)
    except DAMAGED as error:
        raise not_whole(source, error) from None
    _check(reader.tensors, types, file_type, matrix)
    try:
        with HashedFile(target) as stream:
            stream.write(content)
            for piece in _Quantization(source, reader, types, matrix).pieces():
                stream.write(piece)
    except OSError as error:
        raise explained(error, target.parent) from error
    return stream.digest


@dataclass(frozen=True)
class _Rows:
    """Rows of one tensor, all of the same expert.

    Attributes:
        name: of the tensor.
        first: the first row, counted over all experts.
        count: how many.
        importance: of each column; None: all alike.
    """

    name: str
    first: int
    count: int
    importance: np.ndarray | None


def _check(tensors: Mapping[str, GgufTensor], types: Mapping[str, str], file_type: str, matrix: Matrix) -> None:
    """Check before anything is written that each tensor can be quantized."""
    for name, kind in types.items():
        tensor = tensors[name]
        if tensor.type == kind:
            continue
        if tensor.type not in _WIDENED:
            raise ArtifactError(f"{name} is quantized already, as {tensor.type}", "Quantize the unquantized GGUF.")
        if name in matrix:
            columns, needed = matrix[name].size, tensor.shape[0] * math.prod(tensor.shape[2:3])
            if columns != needed and not is_embedding(name):
                raise ArtifactError(f"the importance matrix has {columns} columns for {name}, which has {needed}")
        elif needs_matrix(name, kind, file_type):
            raise ToolchainError(
                f"{file_type} needs an importance matrix (imatrix) for {name}, which becomes {kind}",
                "Choose another quantization, or make it with `--importance-matrix auto`.",
            )


class _Quantization:
    """The tensors of a GGUF in their new types, piece by piece, computed by several threads."""

    def __init__(self, source: Path, reader: HeaderReader, types: Mapping[str, str], matrix: Matrix) -> None:
        self._source, self._reader, self._types, self._matrix = source, reader, types, matrix
        self._library = ggml.library()
        self._files = threading.local()

    def pieces(self) -> Iterator[np.ndarray | bytes]:
        """Yield the bytes of all tensors with their padding, in order."""
        threads = cores()
        with ThreadPoolExecutor(threads) as pool:
            yield from results_in_order(pool, self._tasks(), _AHEAD * threads)

    def _tasks(self) -> Iterator[_Task]:
        for name, kind in self._types.items():
            tensor = self._reader.tensors[name]
            if kind == tensor.type:
                step = 4 * WEIGHTS_AT_ONCE  # whole blocks of every type
                for start in range(0, tensor.size, step):
                    yield partial(self._values, name, start, min(step, tensor.size - start))
            else:
                yield from (partial(self._quantized, rows, kind) for rows in self._pieces_of(name))
            if padding := -header.size_of(tensor.shape, kind) % ALIGNMENT:
                yield partial(bytes, padding)

    def _pieces_of(self, name: str) -> Iterator[_Rows]:
        """Yield the rows of a tensor, some at a time and from one expert only."""
        shape = self._reader.tensors[name].shape
        columns, height, experts = shape[0], shape[1], math.prod(shape[2:])
        means = self._matrix.get(name)
        if means is not None and means.size != columns * experts:
            means = None  # of an embedding
        step = max(1, WEIGHTS_AT_ONCE // columns)
        for expert in range(experts):
            importance = None if means is None else means[expert * columns : (expert + 1) * columns]
            for row in range(0, height, step):
                yield _Rows(name, expert * height + row, min(step, height - row), importance)

    def _quantized(self, rows: _Rows, kind: str) -> np.ndarray:
        import numpy as np

        tensor = self._reader.tensors[rows.name]
        columns, number = tensor.shape[0], header.type_number(kind)
        row_size = header.size_of((columns,), tensor.type)
        values = self._widened(self._values(rows.name, rows.first * row_size, rows.count * row_size), tensor.type)
        result = np.empty(header.size_of((columns, rows.count), kind), np.uint8)
        importance = None if rows.importance is None else rows.importance.ctypes.data
        arguments = (values.ctypes.data, result.ctypes.data, 0, rows.count, columns, importance)
        self._library.ggml_quantize_chunk(number, *arguments)
        if not self._library.ggml_validate_row_data(number, result.ctypes.data, result.size):
            raise ToolchainError(f"{rows.name}: its values don't fit {kind}")
        return result

    def _values(self, name: str, start: int, size: int) -> np.ndarray:
        """Read a part of a tensor, as bytes."""
        import numpy as np

        tensor = self._reader.tensors[name]
        if not hasattr(self._files, "source"):
            self._files.source = self._source.open("rb", buffering=0)
        data = np.empty(size, np.uint8)
        self._files.source.seek(self._reader.start + tensor.offset + start)
        if self._files.source.readinto(data.data) != size:
            raise ArtifactError(f"{self._source}: was truncated while it was read")
        if not self._library.ggml_validate_row_data(header.type_number(tensor.type), data.ctypes.data, size):
            raise ArtifactError(f"{self._source}: {name} has values that are no numbers")
        return data

    def _widened(self, data: np.ndarray, kind: str) -> np.ndarray:
        """Return the fp32 values of some in fp32, f16 or bf16."""
        import numpy as np

        if kind == "F32":
            return data.view(np.float32)
        values = np.empty(data.size // 2, np.float32)
        widen = self._library.ggml_fp16_to_fp32_row if kind == "F16" else self._library.ggml_bf16_to_fp32_row
        widen(data.ctypes.data, values.ctypes.data, values.size)
        return values


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
