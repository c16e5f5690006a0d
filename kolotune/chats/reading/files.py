"""Open chat files of any format, read their chats, and report what is wrong with them."""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

from kolotune.foundation.chat_paths import CHAT_SUFFIXES, PACKED_SUFFIXES, TEXT_SUFFIXES, chat_files_in, is_other_split
from kolotune.foundation.errors import DataError
from kolotune.foundation.objectives import LearnsFrom

from ..chat import Chat
from ..served_form import in_served_form
from .csv_files import read_csv
from .documents import read_text_file
from .faults import Problem
from .json_files import read_json
from .jsonl_files import is_array, read_jsonl
from .misnamed_files import require_as_named
from .named_keys import named_keys
from .objective_records import read_objective_record
from .packed_files import unpacked
from .parquet_files import read_parquet
from .printable import printable
from .reading_options import DEFAULT, ReadingOptions
from .records import AnyRecord, RawRecord
from .shapes import ShapedRecord
from .spreadsheets import SPREADSHEETS, read_spreadsheet
from .turn_fixes import TurnFix

MAX_PROBLEMS_PER_RECORD = 3
_KNOWN = f"{', '.join(CHAT_SUFFIXES)}, also packed ({', '.join(PACKED_SUFFIXES)})"
_JSONL = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
_A_LINE = f"Chats have questions and answers. Write one chat on each line of a .jsonl file: {_JSONL}"
_OTHER_FORMATS = {
    **dict.fromkeys(TEXT_SUFFIXES, f"--objective text trains on plain texts. {_A_LINE}"),
    ".log": _A_LINE,
    **dict.fromkeys((".docx", ".doc", ".pdf", ".odt", ".html"), f"Documents are no chats. {_A_LINE}"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "Unpack it, and give the files of chats inside it."),
    ".arrow": "Save it as Parquet or JSON Lines: Dataset.to_parquet, Dataset.to_json.",
    ".yaml": f"Options are given with --config. {_A_LINE}",
}

Records: TypeAlias = Iterator[AnyRecord]


class ReadChat(NamedTuple):
    """What a record says.

    Attributes:
        shape: The name of its shape; "" if none fits.
        chat: Its chat; None if there are problems, or if its author excludes it from training.
        problems: What is wrong with it.
        unread, unread_hash, fixes: As in `ShapedRecord`.
        named: The keys that the user names and the record has; None if it is damaged.
    """

    shape: str
    chat: Chat | None
    problems: tuple[Problem, ...] = ()
    unread: tuple[str, ...] = ()
    unread_hash: int = 0
    fixes: tuple[TurnFix, ...] = ()
    named: frozenset[str] | None = None


@contextmanager
def opened(path: Path, options: ReadingOptions = DEFAULT) -> Iterator[tuple[str, Records]]:
    """Open a file of chats as the name of its format and its records, each to be read by `read_chat`.

    Raises:
        DataError: The file is missing, a folder, empty, or of an unknown format; also inside the block, when reading
            fails later.
        ToolchainError: It is a Parquet file or a spreadsheet, and the package that reads these is not installed.
    """
    try:
        require_file(path)
        with unpacked(path) as file:
            yield _open(file, options, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_chat(path: Path, record: AnyRecord, options: ReadingOptions = DEFAULT) -> ReadChat:
    """Read a record."""
    parsed = record.parse() if isinstance(record, RawRecord) else record
    fault = parsed.fault
    named = None if fault else named_keys(parsed.value, options)
    shaped = ShapedRecord("", faults=(fault,)) if fault else read_objective_record(parsed.value, options)
    if shaped.faults:
        faults = shaped.faults[:MAX_PROBLEMS_PER_RECORD]
        problems = tuple([Problem(path, parsed.line + fault.line_offset, fault) for fault in faults])
        return ReadChat(shaped.shape, None, problems, named=named)
    if shaped.excluded:
        return ReadChat(shaped.shape, None, named=named)
    chat = Chat(
        shaped.messages,
        path,
        parsed.line,
        shaped.tools,
        rejected=shaped.rejected,
        is_desirable=shaped.is_desirable,
    )
    return ReadChat(shaped.shape, in_served_form(chat), (), shaped.unread, shaped.unread_hash, shaped.fixes, named)


def no_chats(path: Path) -> DataError:
    """Return the error of a file without a single record."""
    return DataError(f"{_shown(path)}: has no chats", "Give a file with at least one chat.")


@dataclass
class ReadResult:
    """Everything in a list of chat files.

    Attributes:
        chats: Every good chat in order, without exact copies.
        problems: Every problem, in order of file and line. A bad chat is never in `chats`.
        shapes: For each file, by its path as given, its format and the shapes of its records.
    """

    chats: tuple[Chat, ...] = ()
    problems: tuple[Problem, ...] = ()
    shapes: dict[str, str] = field(default_factory=dict)


def read_chats(paths: Sequence[Path], options: ReadingOptions = DEFAULT) -> ReadResult:
    """Read a few chats into memory; `dataset.prepare` reads many, chunk by chunk.

    Raises:
        DataError, ToolchainError: As in `opened`.
    """
    result = ReadResult()
    seen: set[tuple[bytes, int]] = set()
    chats: list[Chat] = []
    for path in paths:
        counts: Counter[str] = Counter()
        problems: list[Problem] = []
        empty = True
        with opened(path, options) as (file_format, records):
            for record in records:
                empty = False
                read = read_chat(path, record, options)
                counts[read.shape] += bool(read.shape)
                problems += read.problems
                if read.chat is not None and (digest := (read.chat.content_hash(), read.unread_hash)) not in seen:
                    seen.add(digest)
                    chats.append(read.chat)
        if empty:
            raise no_chats(path)
        result.problems += tuple(sorted(problems, key=lambda problem: problem.line))
        result.shapes[str(path)] = f"{file_format}, {describe_shapes(+counts)}"
    result.chats = tuple(chats)
    return result


def require_file(path: Path) -> int:
    """Return the size of a file that could contain chats; see `opened` for the errors."""
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise DataError(f"{_shown(path)}: no file can have this name ({error})", "Check the name.") from None
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise DataError(f"{_shown(path)}: is a folder", _files_in(path))
    if not stat.S_ISREG(mode):
        # A pipe can't be read twice, and a device may never end.
        raise DataError(f"{_shown(path)}: is not a regular file", "Save the chats into a file first.")
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


def _open(path: Path, options: ReadingOptions, given: Path) -> tuple[str, Records]:
    suffix = path.suffix.lower()
    require_as_named(path, given)
    if options.learns_from is LearnsFrom.TEXT and suffix in TEXT_SUFFIXES:
        return "Text", read_text_file(path)
    if suffix == ".json" or (suffix in (".jsonl", ".ndjson") and is_array(path)):
        return read_json(path)
    if suffix in (".jsonl", ".ndjson"):
        return "JSONL", read_jsonl(path)
    if suffix in (".csv", ".tsv"):
        return suffix[1:].upper(), read_csv(path, options)
    if suffix == ".parquet":
        return "Parquet", read_parquet(path, options)
    if suffix in SPREADSHEETS:
        return "Spreadsheet", read_spreadsheet(path, options)
    kind = f"unknown file format {printable(suffix, 20)}" if suffix else "the file name has no extension"
    raise DataError(f"{_shown(given)}: {kind}", _OTHER_FORMATS.get(suffix, f"Known are {_KNOWN}; convert others."))


def _files_in(folder: Path) -> str:
    """Return what to give in place of a folder."""
    files, inner = chat_files_in(folder), chat_files_in(folder / "data")
    if files and inner:
        shown = ", ".join(printable(str(file.relative_to(folder)), 40) for file in (files[0], inner[0]))
        return f"It has files of chats, and others in its folder data ({shown}). Name those to train on."
    if not (files := files or inner):
        return f"It has no files of chats ({_KNOWN})."
    tests = [printable(file.name, 40) for file in files if is_other_split(file)]
    rest = [printable(file.name, 40) for file in files if not is_other_split(file)]
    named = f"to train on: {', '.join(rest[:3]) or 'none'}; kept for testing: {', '.join(tests[:3])}"
    return f"It has files of several kinds ({named}). Name those to train on, and others with --eval-data."


def describe_shapes(counts: Counter[str]) -> str:
    """Return the names of the shapes in a file, with counts if there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{shape} ({count})" for shape, count in counts.most_common()) or "no shape recognised"
