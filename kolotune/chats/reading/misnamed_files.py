"""Files whose first bytes say that they are not what their name says: reported as a whole, not line by line."""

from __future__ import annotations

import re
from pathlib import Path

from kolotune.foundation.errors import DataError

from .lines import BLANK, BOM
from .printable import printable
from .record_keys import READ_KEYS, canonical

_HEAD_BYTES = 4096
_JSON, _TABLE = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
_MAGIC = ((b"PAR1", ".parquet", "Parquet"), (b"PK\x03\x04", ".zip or .xlsx", "a ZIP archive or a spreadsheet"))
_PACKED = (
    (b"\x1f\x8b", ".gz", "gzip"),
    (b"BZh", ".bz2", "bzip2"),
    (b"\xfd7zXZ\0", ".xz", "xz"),
    (b"(\xb5/\xfd", ".zst", "zstd"),
)
_WEB_PAGE = re.compile(rb"<(!doctype\s+html|html|head)\b", re.IGNORECASE)
_POINTER = b"version https://git-lfs.github.com/spec/"
_ADD = "Add {} to its name."


def require_as_named(path: Path, given: Path) -> None:
    """Check that a file with text in it, by its name, begins as such.

    Args:
        path: The file.
        given: Its name in messages.

    Raises:
        DataError: It is something else.
        OSError: The file can't be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (*_JSON, *_TABLE):
        return
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    found = _found(head.removeprefix(BOM).lstrip(BLANK), suffix)
    if found is not None:
        cause, hint = found
        raise DataError(f"{printable(str(given), 200)}: {cause}, in spite of its name", hint)


def _found(head: bytes, suffix: str) -> tuple[str, str] | None:
    """Return what a file is, and what to do; None for what its name says."""
    for magic, known, name in _MAGIC:
        if head.startswith(magic):
            return f"is {name}", f"Rename it to {known}."
    for magic, known, name in _PACKED:
        if head.startswith(magic):
            return f"is packed with {name}", _ADD.format(known)
    if _WEB_PAGE.match(head):
        return "is a web page, perhaps an error", "Download the file again, or log in first."
    if head.startswith(_POINTER):
        return "is a pointer of Git LFS, without the file itself", "Run `git lfs pull` in its folder, or download it."
    if suffix in _TABLE and head.startswith((b'{"', b'[{"', b"[\n", b"[\r")):
        return "is JSON", "Rename it to .jsonl."
    if suffix in _JSON and _is_table(head):
        return "is a table", "Rename it to .csv."
    return None


def _is_table(head: bytes) -> bool:
    """Whether the first line has names of columns, two of which are known as keys of a record."""
    first = head.splitlines()[0].decode(errors="replace") if head else ""
    if first.startswith(("{", "[")):
        return False
    names = [canonical(name.strip('" ')) for name in re.split(r"[,;\t|]", first)]
    return len(READ_KEYS.intersection(names)) > 1
