"""Read the values of a GGUF's tensors, of whatever type, as fp32: ggml's own functions widen them."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ToolchainError
from kolotune.llamacpp import ggml
from kolotune.weights.gguf_metadata import DAMAGED, not_whole

from . import header

if TYPE_CHECKING:
    import numpy as np

_WEIGHTS_AT_ONCE = 1 << 22
_F32 = "F32"


class StoredValues:
    """The tensors of a GGUF; close it, or use it in a ``with`` statement.

    Attributes:
        tensors: by name.
        summary: returns the header.

    Raises:
        ArtifactError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np

        with path.open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            reader = header.read_whole(self._data, path)
        except DAMAGED as error:
            raise not_whole(path, error) from None
        self.tensors, self.summary = reader.tensors, reader.summary
        self._start = reader.start
        self._bytes = np.frombuffer(self._data, np.uint8)

    def __enter__(self) -> StoredValues:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file."""
        del self._bytes
        self._data.close()

    def position(self, name: str) -> int:
        """Return where a tensor's data begins in the file."""
        return self._start + self.tensors[name].offset

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a tensor's data."""
        start = self.position(name)
        return hashlib.sha256(self._data[start : start + self.tensors[name].size]).hexdigest()

    def data(self, name: str) -> np.ndarray:
        """Return a copy of a tensor's data, uint8."""
        start = self.position(name)
        return self._bytes[start : start + self.tensors[name].size].copy()

    def blocks(self, name: str, into: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of a tensor, some at a time, fp32 ``[rows, columns]``; those of all experts in order.

        Args:
            name: of the tensor.
            into: fp32; a block has as many rows as fit into it, but at least one, and may be overwritten by the next.
                None: each block is an array of its own.
        """
        tensor = self.tensors[name]
        columns = tensor.shape[0]
        row = header.size_of((columns,), tensor.type)
        start, count = self.position(name), tensor.size // row
        step = max(1, (_WEIGHTS_AT_ONCE if into is None else into.size) // columns)
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            data = self._bytes[start + rows.start * row : start + rows.stop * row]
            yield rows, dequantized(data, tensor.type, into).reshape(-1, columns)

    def whole(self, name: str) -> np.ndarray:
        """Return a tensor, fp32, in the order of its dimensions in PyTorch."""
        import numpy as np

        shape = self.tensors[name].shape
        values = np.empty((math.prod(shape[1:]), shape[0]), np.float32)
        for rows, block in self.blocks(name):
            values[rows] = block
        return values.reshape(shape[::-1])


def dequantized(data: np.ndarray, kind: str, into: np.ndarray | None = None) -> np.ndarray:
    """Return the fp32 values of whole blocks of a type.

    Args:
        data: the blocks, uint8.
        kind: name of the type, such as "Q4_K".
        into: fp32; values that fit into it may be written there. None: always a new array.

    Raises:
        ToolchainError: ggml can't widen this type.
    """
    import numpy as np

    if kind == _F32:
        return data.view(np.float32).copy()
    block, size = header.block_of(kind)
    traits = ggml.library().ggml_get_type_traits(header.type_number(kind)).contents
    if not traits.to_float or (traits.blck_size, traits.type_size) != (block, size):
        raise ToolchainError(f"the installed llama.cpp can't read values of type {kind}")
    count = data.size // size * block
    values = np.empty(count, np.float32) if into is None or into.size < count else into[:count]
    traits.to_float(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(values.ctypes.data), values.size)
    return values
