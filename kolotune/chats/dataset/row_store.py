"""The row store: prepared chats on disk, so that memory stays small however many there are.

What becomes of each chat is written as it comes: its row of numbers, its tokens, and the texts that may be needed.
Once all are there, the rows decide which chats are copies, held out or dropped, and the tokens of each part of the
split are copied into the file that is trained on.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .chunks import ChunkResult
from .rows import row_type
from .shingles import ChatFeatures

_CHATS_AT_ONCE = 16_384
_FILES = ("rows", "ids", "labelled", "records", "features")
_IDS, _LABELLED = "<i4", "u1"


class RowStore:
    """Chats in the order of their files. Use it in a ``with`` block, at whose end its folder is deleted.

    Args:
        folder: The folder to create; on the disk of the result, since it is as large.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> RowStore:
        self._folder.mkdir(parents=True)
        self._open = {name: (self._folder / name).open("wb") for name in _FILES}
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        shutil.rmtree(self._folder)

    def add(self, result: ChunkResult) -> None:
        """Write what became of a chunk."""
        self._open["rows"].write(np.array(result.rows, dtype=row_type()).tobytes())
        self._open["ids"].write(np.frombuffer(result.ids, "i4").astype(_IDS, copy=False).tobytes())
        self._open["labelled"].write(result.labelled)
        self._open["records"].writelines(result.records)
        self._open["features"].writelines(result.features)

    def close(self) -> None:
        """End the writing; only reading may follow."""
        for file in self._open.values():
            file.close()

    def rows(self) -> np.ndarray:
        """Return the row of each chat; see `ChatRow`."""
        return np.fromfile(self._folder / "rows", dtype=row_type())

    def features(self, rows: np.ndarray, chosen: np.ndarray) -> Iterator[ChatFeatures]:
        """Yield the features of the chosen chats."""
        for data in self._texts("features", rows["features"], chosen):
            yield pickle.loads(data)

    def write_records(self, rows: np.ndarray, chosen: np.ndarray, path: Path) -> None:
        """Write the chosen chats as JSON Lines; only for those that may be held out."""
        with path.open("wb") as file:
            file.writelines(self._texts("records", rows["record"], chosen))

    def _texts(self, name: str, lengths: np.ndarray, chosen: np.ndarray) -> Iterator[bytes]:
        ends = np.cumsum(lengths, dtype=np.int64)
        with (self._folder / name).open("rb") as file:
            for index in np.flatnonzero(chosen & (lengths > 0)).tolist():
                file.seek(int(ends[index]) - int(lengths[index]))
                yield file.read(int(lengths[index]))

    def write_tokens(self, rows: np.ndarray, chosen: np.ndarray, path: Path) -> int:
        """Write the tokens of the chosen chats as safetensors: ``ids``, ``labelled`` and ``offsets``.

        Returns:
            The number of labelled tokens.
        """
        offsets = np.concatenate(([0], np.cumsum(rows["tokens"][chosen], dtype="<i8")), dtype="<i8")
        total, labelled = int(offsets[-1]), 0
        header, end = {}, 0
        # The widest first, so that each starts at a multiple of its width and can be mapped.
        for name, kind, shape, width in (
            ("offsets", "I64", len(offsets), 8), ("ids", "I32", total, 4), ("labelled", "U8", total, 1),
        ):  # fmt: skip
            header[name] = {"dtype": kind, "shape": [shape], "data_offsets": [end, end + shape * width]}
            end += shape * width
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write(offsets.tobytes())
            for part in self._tokens("ids", _IDS, rows["tokens"], chosen):
                file.write(part.tobytes())
            for part in self._tokens("labelled", _LABELLED, rows["tokens"], chosen):
                file.write(part.tobytes())
                labelled += int(part.sum(dtype=np.int64))
        return labelled

    def _tokens(self, name: str, kind: str, lengths: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
        with (self._folder / name).open("rb") as file:
            for start in range(0, len(lengths), _CHATS_AT_ONCE):
                counts = lengths[start : start + _CHATS_AT_ONCE]
                values = np.fromfile(file, dtype=kind, count=int(counts.sum(dtype=np.int64)))
                yield values[np.repeat(chosen[start : start + _CHATS_AT_ONCE], counts)]


def first_encoded(path: Path) -> tuple[list[int], list[bool]]:
    """Return the tokens and labels of the first chat in a file that `RowStore.write_tokens` wrote."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        end = int(file.get_slice("offsets")[1:2][0])
        return file.get_slice("ids")[:end].tolist(), [bool(label) for label in file.get_slice("labelled")[:end]]
