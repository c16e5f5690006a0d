"""Reading files of chats: which container, which shape, what is wrong, what stands there twice."""

from __future__ import annotations

import errno
import hashlib
import json
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from . import Chat
from .checks import Fault, Problem, printable
from .containers import Row, is_array, read_json, read_jsonl
from .shapes import Reading, read_record
from .tables import read_csv, read_parquet

__all__ = ["Problem", "ReadResult", "read_chats"]

MAX_PROBLEMS_PER_RECORD = 3
_KNOWN = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet"


@dataclass(frozen=True)
class ReadResult:
    """What files of chats hold.

    Attributes:
        chats: every good chat, in order; exact copies of an earlier one are not among them.
        problems: every bad place, in order of file and line. A bad chat is never in `chats`.
        shapes: for each file, by its path as given, the container and shape that were recognised.
        duplicates: (where the copy stands, where the first one stands), each as ``file:line``.
    """

    chats: tuple[Chat, ...]
    problems: tuple[Problem, ...]
    shapes: dict[str, str]
    duplicates: tuple[tuple[str, str], ...]


@dataclass
class _Found:
    chats: list[Chat] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    first_seen: dict[bytes, str] = field(default_factory=dict)


def read_chats(paths: Sequence[Path]) -> ReadResult:
    """Reads files of chats and checks every record.

    Args:
        paths: the files; their names' endings tell the container.

    Returns:
        Chats, problems and duplicates; every record of the files is in one of the three.

    Raises:
        DataError: a file can't be read at all: it is missing, a folder, empty, of an unknown kind, or holds
            no record.
        ToolchainError: a Parquet file is given and pyarrow is not installed.
    """
    if not paths:
        raise DataError("no file of chats was given", "Give at least one file.")
    found = _Found()
    for path in paths:
        try:
            _require_file(path)
            _read_file(path, found)
        except OSError as error:
            raise _unreadable(path, error) from error
    return ReadResult(tuple(found.chats), tuple(found.problems), found.shapes, tuple(found.duplicates))


def _require_file(path: Path) -> None:
    try:
        status = path.stat()
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


def _open(path: Path) -> tuple[str, Iterator[Row]]:
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


def _read_file(path: Path, found: _Found) -> None:
    container, rows = _open(path)
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    row_count = 0
    for row in rows:
        row_count += 1
        reading = Reading("", faults=(row.fault,)) if row.fault else read_record(row.value)
        if reading.shape:
            counts[reading.shape] += 1
        if reading.faults:
            problems += _problems(path, row.line, reading.faults)
        else:
            _keep(Chat(reading.messages, path, row.line, reading.tools), found)
    if not row_count:
        raise DataError(f"{_shown(path)}: has no chats", "Give a file with at least one chat.")
    found.problems += sorted(problems, key=lambda problem: problem.line)
    found.shapes[str(path)] = f"{container}, {_shape_names(counts)}"


def _problems(path: Path, line: int, faults: Iterable[Fault]) -> list[Problem]:
    told = list(faults)[:MAX_PROBLEMS_PER_RECORD]
    return [Problem(path, line + fault.down, fault.kind, fault.message) for fault in told]


def _keep(chat: Chat, found: _Found) -> None:
    content = json.dumps([chat.message_dicts(), chat.tools], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
    first = found.first_seen.get(digest)
    if first is None:
        found.first_seen[digest] = chat.where
        found.chats.append(chat)
    else:
        found.duplicates.append((chat.where, first))


def _shape_names(counts: Counter[str]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{shape} ({count})" for shape, count in counts.most_common()) or "no shape recognised"
