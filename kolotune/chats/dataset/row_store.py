"""Prepared chats on their way to the disk: nothing of them stays in memory, however many there are.

What becomes of each chat is written as it comes: its row of numbers, its tokens, and the texts that may be wanted.
When all are there, the rows decide which chats are copies, held out or left out, and the tokens of each part are
copied into the file that is trained on.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .chunks import COLUMNS, Outcome
from .near_duplicates import Look

if TYPE_CHECKING:
    import numpy as np

_BLOCK = 16_384  # chats copied at once
_FILES = ("rows", "ids", "labelled", "records", "looks")
_IDS, _LABELLED = "<i4", "u1"


class Spool:
    """Chats in the order of their files; use it in a ``with`` block, at whose end its folder is gone.

    Args:
        folder: made for it; on the disk of the result, since it is as large.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, BinaryIO] = {}

    def __enter__(self) -> Spool:
        self._folder.mkdir(parents=True)
        self._open = {name: (self._folder / name).open("wb") for name in _FILES}
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        shutil.rmtree(self._folder)

    def add(self, outcome: Outcome) -> None:
        """Writes what became of some records."""
        import numpy as np

        self._open["rows"].write(np.array(outcome.rows, dtype=_row_type()).tobytes())
        self._open["ids"].write(np.frombuffer(outcome.ids, "i4").astype(_IDS, copy=False).tobytes())
        self._open["labelled"].write(outcome.labelled)
        self._open["records"].writelines(outcome.records)
        self._open["looks"].writelines(outcome.looks)

    def close(self) -> None:
        """Ends the writing; what follows reads."""
        for file in self._open.values():
            file.close()

    def rows(self) -> np.ndarray:
        """The row of each chat; see `COLUMNS`."""
        import numpy as np

        return np.fromfile(self._folder / "rows", dtype=_row_type())

    def looks(self, rows: np.ndarray, chosen: np.ndarray) -> Iterator[Look]:
        """What is compared of the chosen chats."""
        for data in self._texts("looks", rows["look"], chosen):
            yield pickle.loads(data)

    def write_records(self, rows: np.ndarray, chosen: np.ndarray, path: Path) -> None:
        """The chosen chats as JSON Lines; only for those that may be held out."""
        with path.open("wb") as file:
            file.writelines(self._texts("records", rows["record"], chosen))

    def _texts(self, name: str, lengths: np.ndarray, chosen: np.ndarray) -> Iterator[bytes]:
        import numpy as np

        ends = np.cumsum(lengths, dtype=np.int64)
        with (self._folder / name).open("rb") as file:
            for index in np.flatnonzero(chosen & (lengths > 0)).tolist():
                file.seek(int(ends[index]) - int(lengths[index]))
                yield file.read(int(lengths[index]))

    def write_tokens(self, rows: np.ndarray, chosen: np.ndarray, path: Path) -> int:
        """Writes the tokens of the chosen chats as safetensors: ``ids``, ``labelled`` and ``offsets``.

        Returns:
            How many of the tokens are labelled.
        """
        import numpy as np

        offsets = np.concatenate(([0], np.cumsum(rows["tokens"][chosen], dtype="<i8")), dtype="<i8")
        total, labelled = int(offsets[-1]), 0
        header, end = {}, 0
        # The widest first, so that each begins at a multiple of its width and can be mapped.
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
        import numpy as np

        with (self._folder / name).open("rb") as file:
            for start in range(0, len(lengths), _BLOCK):
                counts = lengths[start : start + _BLOCK]
                values = np.fromfile(file, dtype=kind, count=int(counts.sum(dtype=np.int64)))
                yield values[np.repeat(chosen[start : start + _BLOCK], counts)]


def _row_type() -> Any:
    import numpy as np

    return np.dtype(list(COLUMNS))


def first_encoded(path: Path) -> tuple[list[int], list[bool]]:
    """The tokens and labels of the first chat of a file that `Spool.write_tokens` wrote."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        end = int(file.get_slice("offsets")[1:2][0])
        return file.get_slice("ids")[:end].tolist(), [bool(each) for each in file.get_slice("labelled")[:end]]
