"""Read a GGUF's header, and check that the file is whole, without loading the weights."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import ArtifactError
from kolotune.weights.gguf_metadata import DAMAGED, MetadataReader, not_whole

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
        fields: the metadata; a long array is represented by its length, as in `MetadataReader`.
    """

    architecture: str
    tensors: dict[str, GgufTensor]
    fields: dict[str, object]

    def integer(self, name: str, default: int) -> int:
        """Return a field that is a whole number; the default when there is none."""
        value = self.fields.get(name)
        return value if isinstance(value, int) else default

    def first_integer(self, name: str, default: int) -> int:
        """Return a field that is a whole number, or the first of several; the default when there is none."""
        value = self.fields.get(name)
        first = value[0] if isinstance(value, list) and value else value
        return first if isinstance(first, int) else default


class HeaderReader(MetadataReader):
    """Reads a header from front to back; damaged data raises the errors in `DAMAGED`.

    Attributes:
        tensors: by name.
        start: position of the first tensor's data.
        end: position behind the last tensor's data.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        super().__init__(data)
        self.tensors = self.distinct(self.tensor_count, lambda _: self._tensor())
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int):
            raise ValueError("its alignment is not a number")
        self.start = -(-self.position // alignment) * alignment
        self.end = max((self.start + tensor.offset + tensor.size for tensor in self.tensors.values()), default=0)

    def summary(self) -> GgufSummary:
        """Return what was read."""
        return GgufSummary(str(self.fields.get("general.architecture", "")), self.tensors, self.fields)

    def _tensor(self) -> GgufTensor:
        import gguf

        shape = tuple(self.integer("<Q") for _ in range(self.integer("<I")))
        number = self.integer("<I")
        if number in _NEWER:
            name, block, size = _NEWER[number]
        else:
            known = gguf.GGMLQuantizationType(number)
            name, (block, size) = known.name, gguf.GGML_QUANT_SIZES[known]
        return GgufTensor(shape, name, math.prod(shape) // block * size, self.integer("<Q"))


def block_of(name: str) -> tuple[int, int]:
    """Return how many weights a block of a type holds, and in how many bytes.

    Raises:
        KeyError: there is no such type.
    """
    import gguf

    newer = {newer_name: (block, size) for newer_name, block, size in _NEWER.values()}
    return newer[name] if name in newer else gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]


def size_of(shape: Sequence[int], name: str) -> int:
    """Return the bytes of a tensor of a type, without padding."""
    block, size = block_of(name)
    return math.prod(shape) // block * size


def type_number(name: str) -> int:
    """Return ggml's number of a type.

    Raises:
        KeyError: there is no such type.
    """
    import gguf

    newer = {newer_name: number for number, (newer_name, _, _) in _NEWER.items()}
    return newer[name] if name in newer else gguf.GGMLQuantizationType[name].value


def read(path: Path) -> GgufSummary:
    """Read the header of a GGUF, and check that all tensors lie inside the file.

    Raises:
        ArtifactError: it is not a GGUF, or it is truncated.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_whole(data, path).summary()
    except DAMAGED as error:
        raise not_whole(path, error) from None


def read_whole(data: mmap.mmap | bytes, path: Path) -> HeaderReader:
    """Read the header of a model, and check that all tensors lie inside its file.

    Args:
        data: the file at `path`.
        path: for messages.

    Raises:
        ArtifactError: it is truncated, or no model.
        ValueError, KeyError, …: it is damaged; see `gguf_metadata.DAMAGED`.
    """
    header = HeaderReader(data)
    if header.end > len(data):
        raise ArtifactError(f"{path}: is truncated (its tensors extend beyond the end of the file)")
    if not header.tensors or "general.architecture" not in header.fields:
        raise ArtifactError(f"{path}: holds no model")
    return header


def with_flag(header: bytes, name: str, value: bool) -> bytes:
    """Return a header with another value in a boolean field; unchanged when it has no such field."""
    position = HeaderReader(header).flags.get(name)
    return header if position is None else header[:position] + bytes([value]) + header[position + 1 :]


def set_flag(path: Path, name: str, value: bool) -> None:
    """Change a boolean field of a GGUF in place; do nothing when it has no such field."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        position = HeaderReader(data).flags.get(name)
        if position is not None:
            data[position] = value
            data.flush()
