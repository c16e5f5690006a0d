"""Tensors of safetensors files, mapped into memory and worked on some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ArtifactError

from .dtypes import NUMPY_TYPES
from .safetensors_header import Entry, read_header

if TYPE_CHECKING:
    import numpy as np

_BLOCK_WEIGHTS = 1 << 18  # fits the cache of a core


class MappedTensors:
    """Tensors by name; they are mapped from their files and take no memory of this process.

    Attributes:
        entries: all tensors by name, in the order of the files and sorted by name within each.

    Raises:
        ArtifactError: a file is damaged, or two files have a tensor of the same name.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._data: dict[str, np.ndarray] = {}
        for path in files:
            try:
                self._add(path)
            except (OSError, ValueError) as error:
                raise ArtifactError(f"{path}: can't be read: {error}", "Download the model again.") from error

    def _add(self, path: Path) -> None:
        import numpy as np

        header = read_header(path)
        mapped = np.memmap(path, dtype=np.uint8, mode="r")[len(header.content) :]
        tensors = zip(header.entries, header.offsets, strict=True)
        for entry, (start, end) in sorted(tensors, key=lambda tensor: tensor[0].name):
            name = entry.name
            if name in self.entries:
                raise ArtifactError(f"{path}: tensor {name} is also in another file", "Download the model again.")
            if entry.dtype not in NUMPY_TYPES:
                raise ArtifactError(f"{path}: {name} is of type {entry.dtype}, which can't be merged or converted")
            if end - start != entry.size or end > len(mapped):
                raise ValueError(f"{name} is not whole")
            self.entries[name] = entry
            self._data[name] = mapped[start:end].view(NUMPY_TYPES[entry.dtype]).reshape(entry.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return a tensor in its stored dtype (bfloat16 as bits); it is the file itself, and read-only."""
        return self._data[name]


def row_blocks(entry: Entry) -> Iterator[slice]:
    """Yield the rows of a tensor in blocks that fit a core's cache."""
    count = entry.rows
    width = max(entry.size // max(count, 1), 1)
    step = max(2 * _BLOCK_WEIGHTS // width, 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
