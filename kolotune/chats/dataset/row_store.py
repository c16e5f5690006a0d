"""The row store: prepared chats on disk, so that memory stays small however many there are.

What becomes of each chat is written as it comes: its row of numbers, its tokens, and the texts that may be needed.
Once all are there, the rows decide which chats are copies, held out or dropped, and the tokens of each part of the
split are copied into the file that is trained on.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .chunks import ChunkResult
from .packing import pack_pieces
from .rows import WEIGHTED, row_type
from .shingles import ChatFeatures

_CHATS_AT_ONCE = 16_384
_FILES = ("rows", "ids", "labelled", "label_weights", "lengths", "records", "features")
_IDS, _LABELLED, _WEIGHTS, _LENGTHS = "<i4", "u1", "<f4", "<i4"


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
        self._open["label_weights"].write(
            np.frombuffer(result.label_weights, "f4").astype(_WEIGHTS, copy=False).tobytes()
        )
        self._open["lengths"].write(np.frombuffer(result.lengths, "i4").astype(_LENGTHS, copy=False).tobytes())
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
        """Write the tokens of the chosen chats as safetensors.

        ``ids`` and ``labelled`` are those of all sequences, end to end. ``offsets`` has the start of each sequence
        and the end of the last. If a chat has several sequences, ``chats`` has the number of the first sequence of
        each chat, and the number of all sequences; otherwise each sequence is a chat. If some labels count less,
        ``weights`` has how much the loss on each token counts. If some answers are rejected, ``rejected`` has for each
        chat how many of its sequences, the first ones, are of the rejected answer.

        Returns:
            The number of labelled tokens.
        """
        offsets = _sums(self.sequence_lengths(rows, chosen))
        tables = {"offsets": offsets}
        if len(offsets) - 1 > np.count_nonzero(chosen):
            tables["chats"] = _sums(rows["sequences"][chosen])
        if np.any(rows["rejected"][chosen]):
            tables["rejected"] = rows["rejected"][chosen].astype("<i8")
        total, labelled = int(offsets[-1]), 0
        weighted = (rows["flags"] & WEIGHTED) > 0
        has_weights = bool(np.any(weighted & chosen))
        with path.open("wb") as file:
            file.write(_header(tables, total, has_weights=has_weights))
            for table in tables.values():
                file.write(table.tobytes())
            for part in self._tokens("ids", _IDS, rows["tokens"], chosen):
                file.write(part.tobytes())
            for part in self._weights(rows["tokens"], weighted, chosen) if has_weights else ():
                file.write(part.tobytes())
            for part in self._tokens("labelled", _LABELLED, rows["tokens"], chosen):
                file.write(part.tobytes())
                labelled += int(part.sum(dtype=np.int64))
        return labelled

    def write_packed(self, rows: np.ndarray, chosen: np.ndarray, path: Path, longest: int) -> int:
        """Write the pieces of the chosen documents as `write_tokens` writes chats: a packed sequence is a chat.

        Args:
            rows, chosen: The documents.
            path: The file.
            longest: The most tokens of a packed sequence.

        Returns:
            The number of packed sequences.
        """
        lengths = self.sequence_lengths(rows, np.ones(len(rows), bool)).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        pieces = np.flatnonzero(np.repeat(chosen, rows["sequences"]))
        packed = pack_pieces(lengths[pieces], longest)
        order = pieces[[piece for sequence in packed for piece in sequence]]
        tables = {"offsets": _sums(lengths[order]), "chats": _sums(np.array(list(map(len, packed))))}
        columns = (("ids", _IDS), ("labelled", _LABELLED))
        with path.open("wb") as file:
            file.write(_header(tables, int(lengths[order].sum()), has_weights=False))
            for table in tables.values():
                file.write(table.tobytes())
            for name, kind in columns:
                stored = np.memmap(self._folder / name, kind, "r")
                for piece in order.tolist():
                    file.write(stored[starts[piece] : starts[piece] + lengths[piece]].tobytes())
        return len(packed)

    def sequence_lengths(self, rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Return the tokens of each sequence of the chosen chats."""
        counts = rows["sequences"][chosen]
        if not np.any(counts > 1):
            return np.asarray(rows["tokens"][chosen])
        several = rows["sequences"] > 1
        of_several = np.fromfile(self._folder / "lengths", dtype=_LENGTHS)
        lengths = np.empty(int(counts.sum(dtype=np.int64)), dtype=_LENGTHS)
        is_of_several = np.repeat(counts > 1, counts)
        lengths[is_of_several] = of_several[np.repeat(chosen[several], rows["sequences"][several])]
        lengths[~is_of_several] = rows["tokens"][chosen][counts == 1]
        return lengths

    def _weights(self, lengths: np.ndarray, weighted: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
        """Yield how much the loss on each token of the chosen chats counts; in full where a chat says nothing."""
        with (self._folder / "labelled").open("rb") as labels, (self._folder / "label_weights").open("rb") as given:
            for start in range(0, len(lengths), _CHATS_AT_ONCE):
                block = slice(start, start + _CHATS_AT_ONCE)
                counts = lengths[block]
                values = np.fromfile(labels, dtype=_LABELLED, count=int(counts.sum(dtype=np.int64))).astype(_WEIGHTS)
                own = np.repeat(weighted[block], counts)
                values[own] = np.fromfile(given, dtype=_WEIGHTS, count=int(np.count_nonzero(own)))
                yield values[np.repeat(chosen[block], counts)]

    def _tokens(self, name: str, kind: str, lengths: np.ndarray, chosen: np.ndarray) -> Iterator[np.ndarray]:
        with (self._folder / name).open("rb") as file:
            for start in range(0, len(lengths), _CHATS_AT_ONCE):
                counts = lengths[start : start + _CHATS_AT_ONCE]
                values = np.fromfile(file, dtype=kind, count=int(counts.sum(dtype=np.int64)))
                yield values[np.repeat(chosen[start : start + _CHATS_AT_ONCE], counts)]


def _header(tables: Mapping[str, np.ndarray], tokens: int, *, has_weights: bool) -> bytes:
    """Return what a safetensors file begins with, for tables of int64 and the columns of tokens."""
    header, end = {}, 0
    # The widest first, so that each starts at a multiple of its width and can be mapped.
    for name, kind, shape, width in (
        *((name, "I64", len(table), 8) for name, table in tables.items()),
        ("ids", "I32", tokens, 4), *[("weights", "F32", tokens, 4)] * has_weights, ("labelled", "U8", tokens, 1),
    ):  # fmt: skip
        header[name] = {"dtype": kind, "shape": [shape], "data_offsets": [end, end + shape * width]}
        end += shape * width
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sums(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts, dtype="<i8")), dtype="<i8")


def has_weights(path: Path) -> bool:
    """Return whether some labels count less in a file that `RowStore.write_tokens` wrote; only its header is read."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return "weights" in file.keys()  # noqa: SIM118 - no mapping


def first_encoded(path: Path) -> list[tuple[list[int], list[bool]]]:
    """Return the tokens and labels of each sequence of the first chat in a file that `RowStore.write_tokens` wrote."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        count = int(file.get_slice("chats")[1:2][0]) if "chats" in file.keys() else 1  # noqa: SIM118 - no mapping
        offsets = file.get_slice("offsets")[: count + 1].tolist()
        ids, labelled = (file.get_slice(name)[: offsets[-1]].tolist() for name in ("ids", "labelled"))
    return [(ids[start:end], [bool(label) for label in labelled[start:end]]) for start, end in pairwise(offsets)]


def first_rejected(path: Path) -> int:
    """Return how many of the sequences that `first_encoded` returns, the first ones, are of a rejected answer."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return int(file.get_slice("rejected")[0:1][0]) if "rejected" in file.keys() else 0  # noqa: SIM118 - no mapping
