"""The header of a safetensors file: names, dtypes and shapes of its tensors, and where their data lies."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject

from .dtypes import NUMPY_TYPES

_LONGEST = 100_000_000  # the format's own limit
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor as a header describes it; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        import numpy as np

        return np.dtype(NUMPY_TYPES[self.dtype]).itemsize * math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar has one row."""
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True)
class Header:
    """A file's header.

    Attributes:
        content: its bytes, with the length in front.
        entries: the tensors, in the order of the header.
        offsets: start and end of each one's data, from the end of the header.
    """

    content: bytes
    entries: list[Entry]
    offsets: list[tuple[int, int]]


@dataclass(frozen=True)
class _TensorDescription:
    """A value in the header's JSON."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_header(path: Path) -> Header:
    """Read the header of a file.

    Raises:
        OSError: the file can't be read.
        ValueError: it has no such header.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if length > _LONGEST:
            raise ValueError("its header is too long")
        text = file.read(length)
    values = typed_storage.parse_object(text)
    values.pop(_METADATA, None)
    described = typed_storage.convert(dict[str, _TensorDescription], values)
    entries = [Entry(name, tensor.dtype, tensor.shape) for name, tensor in described.items()]
    return Header(prefix + text, entries, [tensor.data_offsets for tensor in described.values()])


def make_header(entries: Sequence[Entry]) -> bytes:
    """Return the header of a file that holds these tensors one after the other."""
    described: JsonObject = {_METADATA: {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.size
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text
