"""Read packed files (gzip, bzip2, xz, zstd): each is unpacked into a temporary file while its records are read."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kolotune.foundation.chat_paths import PACKED_SUFFIXES
from kolotune.foundation.errors import DataError, ToolchainError

from .printable import printable


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Return the file that a packed one contains; another file is returned as it is.

    Raises:
        DataError: The file is damaged, or there is no space for what it contains.
        ToolchainError: It is a zstd file, and pyarrow is not installed.
        OSError: The file can't be read.
    """
    suffix = path.suffix.lower()
    if suffix not in PACKED_SUFFIXES:
        yield path
        return
    shown = printable(str(path), 200)
    with tempfile.TemporaryDirectory(prefix="kolotune-") as folder:
        # Its name decides its format, and is in messages.
        target = Path(folder, Path(path.name).stem)
        with _OPENERS[suffix](path) as packed, target.open("wb") as out:
            try:
                shutil.copyfileobj(packed, out, 1 << 20)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                cause = printable(str(error), 100)
                raise DataError(f"{shown}: can't be unpacked: {cause}", "Get the file again; it may be cut.") from error
        if not target.stat().st_size:
            raise DataError(f"{shown}: is empty", "Give a file with at least one chat.")
        yield target


def _zstd(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        shown = printable(str(path), 200)
        raise ToolchainError(f"{shown}: reading zstd needs pyarrow", "pip install pyarrow") from None
    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}
