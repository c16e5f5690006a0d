"""The blocks of a quantized GGUF in a model folder, beside the weights that they stand for.

`gguf.dequantize` writes them: each row of a matrix as bytes, in the order of the model's own rows, in safetensors'
format. The file has another suffix, since its tensors are no weights of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import ModelError

from .safetensors_header import Entry, read_header

FILE = "gguf_blocks.bin"
TYPES = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"})
"""The types of blocks that can be trained on."""
_BETWEEN = ":"


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in blocks.

    Attributes:
        name: of the model's weight.
        type: ggml's name of the blocks' type, such as "Q4_K".
        entry: its bytes in the file, uint8 ``[rows, bytes of a row]``.
    """

    name: str
    type: str
    entry: Entry

    @classmethod
    def of(cls, name: str, kind: str, rows: int, row_bytes: int) -> StoredMatrix:
        return cls(name, kind, Entry(f"{kind}{_BETWEEN}{name}", "U8", (rows, row_bytes)))


def has_blocks(folder: Path) -> bool:
    """Return whether a model folder was made from a quantized GGUF, and has its blocks."""
    return (folder / FILE).is_file()


def read_matrices(folder: Path) -> Sequence[StoredMatrix]:
    """Return the matrices that a model folder has in blocks; () if it was not made from a GGUF.

    Raises:
        ModelError: the file of the blocks is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return ()
    try:
        header = read_header(path)
        if len(header.content) + max((end for _, end in header.offsets), default=0) != path.stat().st_size:
            raise ValueError("it is not whole")
        parts = [(entry, entry.name.partition(_BETWEEN)) for entry in header.entries]
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: can't be read: {error}", "Make the folder again with `kolotune dequantize`."
        ) from None
    return tuple(StoredMatrix(name, kind, entry) for entry, (kind, _, name) in parts)
