"""Reads a GGUF's header and checks that the file is whole, without loading the weights.

The gguf package's reader makes several objects of every token and merge: 12 seconds for a tokenizer like
Llama 3's. This one steps over them. The format is described in ggml's docs/gguf.md.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ArtifactError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SHORT = 64  # longer arrays are given by their length
_ALIGNMENT = 32
_NEWER = {42: ("Q2_0", 64, 18)}  # the pinned llama.cpp writes it, the gguf package (0.19) doesn't know it yet


@dataclass(frozen=True)
class GgufSummary:
    """What a GGUF says of itself.

    Attributes:
        architecture: as "llama".
        tensors: name → (shape as in the file, name of the type, bytes).
        fields: the metadata; long arrays are given by their length.
    """

    architecture: str
    tensors: dict[str, tuple[tuple[int, ...], str, int]]
    fields: dict[str, Any]


class _Header:
    """Goes through a header from its beginning; errors are those of what it is read with."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data, self._at = data, 0
        self.flags: dict[str, int] = {}  # where the yes-or-no fields stand
        if data[:4] != b"GGUF" or self._number("<I", start=4) not in (2, 3):
            raise ValueError("no GGUF of version 2 or 3")
        tensors, fields = self._number("<Q"), self._number("<Q")
        self.fields = self._distinct(fields, self._field)
        infos = self._distinct(tensors, self._tensor)
        alignment = int(self.fields.get("general.alignment", _ALIGNMENT))
        begin = -(-self._at // alignment) * alignment
        self.end = max((begin + offset + size for _, _, size, offset in infos.values()), default=0)
        self.tensors = {name: (shape, kind, size) for name, (shape, kind, size, _) in infos.items()}

    def _distinct(self, count: int, read: Callable[[str], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self._text()
            if name in found:
                raise ValueError(f"{name} stands there twice")
            found[name] = read(name)
        return found

    def _number(self, form: str, start: int | None = None) -> Any:
        at = self._at if start is None else start
        self._at = at + struct.calcsize(form)
        return struct.unpack_from(form, self._data, at)[0]

    def _text(self) -> str:
        start = self._at + 8
        self._at = start + int(self._number("<Q"))
        if self._at > len(self._data):
            raise ValueError("a text ends behind the file's end")
        return self._data[start : self._at].decode("utf-8")

    def _field(self, name: str) -> Any:
        kind = self._number("<I")
        if kind == _BOOL:
            self.flags[name] = self._at
        return self._array() if kind == _ARRAY else self._value(kind)

    def _value(self, kind: int) -> Any:
        return self._text() if kind == _STRING else self._number(_SCALARS[kind])

    def _array(self) -> Any:
        kind, count = self._number("<I"), self._number("<Q")
        if count <= _SHORT:
            return [self._array() if kind == _ARRAY else self._value(kind) for _ in range(count)]
        if kind == _STRING:
            length = struct.Struct("<Q").unpack_from
            for _ in range(count):
                self._at += 8 + int(length(self._data, self._at)[0])
        else:
            self._at += count * struct.calcsize(_SCALARS[kind])
        return count

    def _tensor(self, name: str) -> tuple[tuple[int, ...], str, int, int]:
        import gguf

        del name
        shape = tuple(int(self._number("<Q")) for _ in range(self._number("<I")))
        number = self._number("<I")
        if number in _NEWER:
            kind, block, size = _NEWER[number]
        else:
            known = gguf.GGMLQuantizationType(number)
            kind, (block, size) = known.name, gguf.GGML_QUANT_SIZES[known]
        elements = 1
        for extent in shape:
            elements *= extent
        return shape, kind, elements // block * size, int(self._number("<Q"))


def block_of(kind: str) -> tuple[int, int]:
    """A type's block: how many weights, and in how many bytes.

    Raises:
        KeyError: there is no such type.
    """
    import gguf

    newer = {name: (block, size) for name, block, size in _NEWER.values()}
    return newer[kind] if kind in newer else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def read(path: Path) -> GgufSummary:
    """The summary of a GGUF whose tensors all lie inside the file.

    Raises:
        ArtifactError: it is no GGUF, or it is cut.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header, size = _Header(data), len(data)
    except (ValueError, OSError, KeyError, struct.error, OverflowError, MemoryError, ZeroDivisionError) as error:
        raise ArtifactError(f"{path}: is no whole GGUF ({error})") from None
    except (TypeError, RecursionError) as error:
        raise ArtifactError(f"{path}: is no whole GGUF ({type(error).__name__})") from None
    if header.end > size:
        raise ArtifactError(f"{path}: is cut (its tensors end behind the file's end)")
    if not header.tensors or "general.architecture" not in header.fields:
        raise ArtifactError(f"{path}: holds no model")
    return GgufSummary(str(header.fields["general.architecture"]), header.tensors, header.fields)


def with_flag(header: bytes, name: str, value: bool) -> bytes:
    """A GGUF's beginning with another value in a yes-or-no field; the same when it has none of that name."""
    at = _Header(header).flags.get(name)
    return header if at is None else header[:at] + bytes([value]) + header[at + 1 :]


def set_flag(path: Path, name: str, value: bool) -> None:
    """Changes a yes-or-no field of a whole GGUF in place; nothing happens when it has none of that name."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        at = _Header(data).flags.get(name)
        if at is not None:
            data[at] = value
            data.flush()
