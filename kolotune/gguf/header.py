"""Read a GGUF's header, and check that the file is whole, without loading the weights.

The gguf package's reader makes several objects for every token and merge: 12 seconds for a tokenizer like Llama 3's.
This one skips them. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kolotune.foundation.errors import ArtifactError

T = TypeVar("T")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_LONGEST_ARRAY = 64
_ALIGNMENT = 32
_NEWER = {42: ("Q2_0", 64, 18)}  # the pinned llama.cpp writes it; the gguf package (0.19) doesn't know it yet


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a header.

    Attributes:
        shape: as in the file, fastest dimension first.
        type: name of its type, such as "Q4_K".
        size: bytes, without padding.
        offset: of its data, from the start of all data.
    """

    shape: tuple[int, ...]
    type: str
    size: int
    offset: int


@dataclass(frozen=True)
class GgufSummary:
    """The header of a GGUF.

    Attributes:
        architecture: such as "llama".
        tensors: by name.
        fields: the metadata; an array of more than 64 values is represented by its length.
    """

    architecture: str
    tensors: dict[str, GgufTensor]
    fields: dict[str, object]

    def integer(self, name: str, default: int) -> int:
        """Return a field that is a whole number; the default when there is none."""
        value = self.fields.get(name)
        return value if isinstance(value, int) else default


class _HeaderReader:
    """Reads a header from front to back; damaged data raises the errors of struct, mmap and the types."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data, self._position = data, 4
        self.flags: dict[str, int] = {}  # positions of the boolean fields
        if data[:4] != b"GGUF" or self._integer("<I") not in (2, 3):
            raise ValueError("not a GGUF of version 2 or 3")
        tensors, fields = self._integer("<Q"), self._integer("<Q")
        self.fields = self._distinct(fields, self._field)
        self.tensors = self._distinct(tensors, lambda _: self._tensor())
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int):
            raise ValueError("its alignment is not a number")
        start = -(-self._position // alignment) * alignment
        self.end = max((start + tensor.offset + tensor.size for tensor in self.tensors.values()), default=0)

    def _distinct(self, count: int, read: Callable[[str], T]) -> dict[str, T]:
        values: dict[str, T] = {}
        for _ in range(count):
            name = self._text()
            if name in values:
                raise ValueError(f"{name} occurs twice")
            values[name] = read(name)
        return values

    def _scalar(self, code: str) -> int | float | bool:
        start = self._position
        self._position += struct.calcsize(code)
        value: int | float | bool = struct.unpack_from(code, self._data, start)[0]
        return value

    def _integer(self, code: str) -> int:
        return int(self._scalar(code))

    def _text(self) -> str:
        start = self._position + 8
        self._position = start + self._integer("<Q")
        if self._position > len(self._data):
            raise ValueError("a text extends beyond the end of the file")
        return self._data[start : self._position].decode("utf-8")

    def _field(self, name: str) -> object:
        kind = self._integer("<I")
        if kind == _BOOL:
            self.flags[name] = self._position
        return self._array() if kind == _ARRAY else self._value(kind)

    def _value(self, kind: int) -> object:
        return self._text() if kind == _STRING else self._scalar(_SCALARS[kind])

    def _array(self) -> object:
        kind, count = self._integer("<I"), self._integer("<Q")
        if count <= _LONGEST_ARRAY:
            return [self._array() if kind == _ARRAY else self._value(kind) for _ in range(count)]
        if kind == _STRING:
            length = struct.Struct("<Q").unpack_from
            for _ in range(count):
                self._position += 8 + int(length(self._data, self._position)[0])
        else:
            self._position += count * struct.calcsize(_SCALARS[kind])
        return count

    def _tensor(self) -> GgufTensor:
        import gguf

        shape = tuple(self._integer("<Q") for _ in range(self._integer("<I")))
        number = self._integer("<I")
        if number in _NEWER:
            name, block, size = _NEWER[number]
        else:
            known = gguf.GGMLQuantizationType(number)
            name, (block, size) = known.name, gguf.GGML_QUANT_SIZES[known]
        return GgufTensor(shape, name, math.prod(shape) // block * size, self._integer("<Q"))


def block_of(name: str) -> tuple[int, int]:
    """Return how many weights a block of a type holds, and in how many bytes.

    Raises:
        KeyError: there is no such type.
    """
    import gguf

    newer = {newer_name: (block, size) for newer_name, block, size in _NEWER.values()}
    return newer[name] if name in newer else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def read(path: Path) -> GgufSummary:
    """Read the header of a GGUF, and check that all tensors lie inside the file.

    Raises:
        ArtifactError: it is not a GGUF, or it is truncated.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header, size = _HeaderReader(data), len(data)
    except (ValueError, OSError, KeyError, struct.error, OverflowError, MemoryError, ZeroDivisionError) as error:
        raise ArtifactError(f"{path}: not a whole GGUF ({error})") from None
    except (TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a whole GGUF ({type(error).__name__})") from None
    if header.end > size:
        raise ArtifactError(f"{path}: is truncated (its tensors extend beyond the end of the file)")
    if not header.tensors or "general.architecture" not in header.fields:
        raise ArtifactError(f"{path}: holds no model")
    return GgufSummary(str(header.fields["general.architecture"]), header.tensors, header.fields)


def with_flag(header: bytes, name: str, value: bool) -> bytes:
    """Return a header with another value in a boolean field; unchanged when it has no such field."""
    position = _HeaderReader(header).flags.get(name)
    return header if position is None else header[:position] + bytes([value]) + header[position + 1 :]


def set_flag(path: Path, name: str, value: bool) -> None:
    """Change a boolean field of a GGUF in place; do nothing when it has no such field."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        position = _HeaderReader(data).flags.get(name)
        if position is not None:
            data[position] = value
            data.flush()
