"""Reading files of chats: which container, which shape, what is wrong."""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.foundation.errors import DataError

from ..chat import Chat
from .faults import Fault, Problem, printable
from .json_files import Row, Unparsed, is_array, read_json, read_jsonl
from .records import Reading, read_record
from .tables import read_csv, read_parquet

MAX_PROBLEMS_PER_RECORD = 3
_KNOWN = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet"


Records = Iterator[Row | Unparsed]


@contextmanager
def opened(path: Path) -> Iterator[tuple[str, Records]]:
    """A file of chats: the name of its container, and its records, each to be read by `read_chat`.

    Raises:
        DataError: the file can't be read at all: it is missing, a folder, empty, or of an unknown kind; also in the
            block, when reading fails later.
        ToolchainError: a Parquet file is given and pyarrow is not installed.
    """
    try:
        require_file(path)
        yield _open(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_chat(path: Path, record: Row | Unparsed) -> tuple[str, Chat | list[Problem]]:
    """The shape of a record ("" when none is recognised), and its chat or what is wrong with it."""
    row = record.row() if isinstance(record, Unparsed) else record
    reading = Reading("", faults=(row.fault,)) if row.fault else read_record(row.value)
    if reading.faults:
        return reading.shape, _problems(path, row.line, reading.faults)
    return reading.shape, Chat(reading.messages, path, row.line, reading.tools)


def no_chats(path: Path) -> DataError:
    """The error of a file in which not even a bad record stands."""
    return DataError(f"{_shown(path)}: has no chats", "Give a file with at least one chat.")


@dataclass
class ReadResult:
    """All that files of chats hold.

    Attributes:
        chats: every good chat, in order; exact copies of an earlier one are not among them.
        problems: every bad place, in order of file and line. A bad chat is never in `chats`.
        shapes: for each file, by its path as given, the container and shape that were recognised.
    """

    chats: tuple[Chat, ...] = ()
    problems: tuple[Problem, ...] = ()
    shapes: dict[str, str] = field(default_factory=dict)


def read_chats(paths: Sequence[Path]) -> ReadResult:
    """Reads few chats at once; `preparing` reads many, chunk by chunk.

    Raises:
        DataError, ToolchainError: see `opened`.
    """
    result = ReadResult()
    seen: set[bytes] = set()
    chats: list[Chat] = []
    for path in paths:
        counts: Counter[str] = Counter()
        problems: list[Problem] = []
        empty = True
        with opened(path) as (container, records):
            for record in records:
                empty = False
                shape, chat = read_chat(path, record)
                counts[shape] += bool(shape)
                if isinstance(chat, Chat):
                    if (digest := chat.content_hash()) not in seen:
                        seen.add(digest)
                        chats.append(chat)
                else:
                    problems += chat
        if empty:
            raise no_chats(path)
        result.problems += tuple(sorted(problems, key=lambda problem: problem.line))
        result.shapes[str(path)] = f"{container}, {shape_names(+counts)}"
    result.chats = tuple(chats)
    return result


def require_file(path: Path) -> int:
    """The size of a file that could hold chats; see `opened` for the errors."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise DataError(f"{_shown(path)}: no file can have this name ({error})", "Check the name.") from None
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise DataError(f"{_shown(path)}: is a folder", "Give the file of chats inside it.")
    if not stat.S_ISREG(mode):
        # A pipe can't be read twice, and a device may never end.
        raise DataError(f"{_shown(path)}: is no regular file", "Save the chats into a file first.")
    if status.st_size == 0:
        raise DataError(f"{_shown(path)}: is empty", "Give a file with at least one chat.")
    return status.st_size


def _unreadable(path: Path, error: OSError) -> DataError:
    reasons = {
        errno.ENOENT: ("no such file", "Check the name and the folder."),
        errno.EACCES: ("no permission to read it", "Make it readable for your user."),
    }
    plain = f"can't be read: {printable(error.strerror or str(error), 100)}"
    reason, hint = reasons.get(error.errno or 0, (plain, "Check the file and its disk."))
    return DataError(f"{_shown(path)}: {reason}", hint)


def _shown(path: Path) -> str:
    return printable(str(path), 200)


def _open(path: Path) -> tuple[str, Records]:
    suffix = path.suffix.lower()
    if suffix == ".json" or (suffix in (".jsonl", ".ndjson") and is_array(path)):
        return read_json(path)
    if suffix in (".jsonl", ".ndjson"):
        return "JSONL", read_jsonl(path)
    if suffix in (".csv", ".tsv"):
        return suffix[1:].upper(), read_csv(path)
    if suffix == ".parquet":
        return "Parquet", read_parquet(path)
    kind = f"unknown kind of file {printable(suffix, 20)}" if suffix else "a file without an ending in its name"
    raise DataError(f"{_shown(path)}: {kind}", f"Known are {_KNOWN}; unpack archives, and rename or convert others.")


def _problems(path: Path, line: int, faults: Iterable[Fault]) -> list[Problem]:
    told = list(faults)[:MAX_PROBLEMS_PER_RECORD]
    return [Problem(path, line + fault.down, fault.kind, fault.message) for fault in told]


def shape_names(counts: Counter[str]) -> str:
    """The shapes of a file's records, in the user's words."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{shape} ({count})" for shape, count in counts.most_common()) or "no shape recognised"
