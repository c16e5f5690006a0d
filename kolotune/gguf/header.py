"""Read a GGUF's header, and check that the file is whole, without loading the weights."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import ArtifactError
from kolotune.llamacpp.gguf_metadata import DAMAGED, MetadataReader, not_whole

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


class _HeaderReader(MetadataReader):
    """Reads a header from front to back."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        super().__init__(data)
        self.tensors = self.distinct(self.tensor_count, lambda _: self._tensor())
        alignment = self.fields.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int):
            raise ValueError("its alignment is not a number")
        start = -(-self.position // alignment) * alignment
        self.end = max((start + tensor.offset + tensor.size for tensor in self.tensors.values()), default=0)

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


def read(path: Path) -> GgufSummary:
    """Read the header of a GGUF, and check that all tensors lie inside the file.

    Raises:
        ArtifactError: it is not a GGUF, or it is truncated.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header, size = _HeaderReader(data), len(data)
    except DAMAGED as error:
        raise not_whole(path, error) from None
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
