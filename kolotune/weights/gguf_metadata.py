"""Read the metadata of a GGUF in plain Python, without the gguf package and without its tensors.

The gguf package's reader makes several objects for every token and merge: 12 seconds for a tokenizer like Llama 3's.
This one skips them unless they are asked for. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from kolotune.foundation.errors import ArtifactError

T = TypeVar("T")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LONGEST_ARRAY, _MOST_TEXTS = 512, 64  # llama.cpp's models have at most 512 layers, with a number for each
DAMAGED = (
    ValueError, OSError, KeyError, struct.error, OverflowError, MemoryError, ZeroDivisionError, TypeError,
    RecursionError,
)  # fmt: skip
"""What reading damaged data may raise."""


class MetadataReader:
    """Reads a GGUF from the front up to its metadata's end; damaged data raises the errors in `DAMAGED`.

    Attributes:
        fields: the metadata; an array of more than 512 numbers or 64 texts is represented by its length.
        flags: the positions of the boolean fields.
        spans: where each field's type and value are.
        tensor_count: the number of tensors that follow.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data, self._position = data, 4
        self.flags: dict[str, int] = {}
        self.spans: dict[str, slice] = {}
        if data[:4] != b"GGUF" or self.integer("<I") not in (2, 3):
            raise ValueError("not a GGUF of version 2 or 3")
        self.tensor_count, count = self.integer("<Q"), self.integer("<Q")
        self.fields = self.distinct(count, self._field)

    @property
    def position(self) -> int:
        """The position of the next byte to be read."""
        return self._position

    def distinct(self, count: int, read: Callable[[str], T]) -> dict[str, T]:
        """Read entries that have a name and a value; `read` reads the value."""
        values: dict[str, T] = {}
        for _ in range(count):
            name = self._text()
            if name in values:
                raise ValueError(f"{name} occurs twice")
            values[name] = read(name)
        return values

    def array(self, name: str) -> list[object]:
        """Return a field that is an array, however long it is; read after everything else."""
        self._position = self.spans[name].start + struct.calcsize("<I")
        kind, count = self.integer("<I"), self.integer("<Q")
        return [self._value(kind) for _ in range(count)]

    def integer(self, code: str) -> int:
        """Read a whole number of a type of `struct`."""
        return int(self._scalar(code))

    def _scalar(self, code: str) -> int | float | bool:
        start = self._position
        self._position += struct.calcsize(code)
        value: int | float | bool = struct.unpack_from(code, self._data, start)[0]
        return value

    def _text(self) -> str:
        start = self._position + 8
        self._position = start + self.integer("<Q")
        if self._position > len(self._data):
            raise ValueError("a text extends beyond the end of the file")
        return self._data[start : self._position].decode("utf-8")

    def _field(self, name: str) -> object:
        start = self._position
        kind = self.integer("<I")
        if kind == _BOOL:
            self.flags[name] = self._position
        value = self._array() if kind == _ARRAY else self._value(kind)
        self.spans[name] = slice(start, self._position)
        return value

    def _value(self, kind: int) -> object:
        return self._text() if kind == _STRING else self._scalar(_SCALARS[kind])

    def _array(self) -> object:
        kind, count = self.integer("<I"), self.integer("<Q")
        if count <= (_MOST_TEXTS if kind == _STRING else _LONGEST_ARRAY):
            return [self._array() if kind == _ARRAY else self._value(kind) for _ in range(count)]
        if kind == _STRING:
            length = struct.Struct("<Q").unpack_from
            for _ in range(count):
                self._position += 8 + int(length(self._data, self._position)[0])
        else:
            self._position += count * struct.calcsize(_SCALARS[kind])
        return count


def read_metadata(path: Path) -> dict[str, object]:
    """Return the metadata of a GGUF; a long array is represented by its length, as in `MetadataReader`.

    Raises:
        ArtifactError: it is not a GGUF, or it is truncated.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return MetadataReader(data).fields
    except DAMAGED as error:
        raise not_whole(path, error) from None


def not_whole(path: Path, error: Exception) -> ArtifactError:
    """Return the error for a damaged GGUF; the messages of Python's own type errors would say nothing to a user."""
    reason = type(error).__name__ if isinstance(error, TypeError | RecursionError) else error
    return ArtifactError(f"{path}: not a whole GGUF ({reason})")
