"""SHA-256 of files, each read at most once: hashes are known from an earlier look, or from the writing itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from . import typed_storage
from .errors import ArtifactError, SpaceError
from .files import files_of, flush, replacing

if TYPE_CHECKING:
    import numpy as np

_FLUSHED_AT_ONCE = 128 << 20
_CLOCK_SECONDS = 0.012  # more than a tick of the clock that stamps files
_Known: TypeAlias = tuple[int, int, int, int, str]
"""Size, time of modification and of change, inode, and digest of a file."""


class Hasher:
    """Hash files and folders; a file is read again only if its size, times or inode changed.

    Files written through `replacing` are hashed while they are written and not read again.

    Args:
        cache: hashes of an earlier process, trusted for files that have not been touched since; None: start without.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._known: dict[str, _Known] = {}
        # Digests of files that do not have their final name yet, by what a rename does not change.
        self._written: dict[tuple[int, ...], str] = {}
        if cache is not None:
            with contextlib.suppress(OSError, typed_storage.StorageError):
                self._known = typed_storage.read(dict[str, _Known], cache)

    def of(self, path: Path) -> str:
        """Return the hex digest of a file's bytes, or of a folder's file names and bytes; "" if there is nothing."""
        if path.is_dir():
            total = hashlib.sha256()
            for each in files_of(path):
                total.update(f"{each.relative_to(path).as_posix()}\0{self._of_file(each)}\n".encode())
            return total.hexdigest()
        return self._of_file(path) if path.is_file() else ""

    def _of_file(self, path: Path) -> str:
        known = self._known.get(str(path))
        stamp = _stamp(path.stat())
        if known is not None and known[:4] == stamp:
            return known[4]
        digest = hash_file(path)
        self._known[str(path)] = (*stamp, digest)
        return digest

    @contextlib.contextmanager
    def replacing(self, target: Path) -> Iterator[Path]:
        """Replace a file or folder as `files.replacing` does, and keep the digests of what was written in the block.

        In the block, `create`, `flush` and `note` keep digests.
        """
        try:
            with replacing(target) as temporary:
                yield temporary
        except BaseException:
            self._written.clear()  # a later file may have the inode of a removed one
            raise
        if self._written:
            time.sleep(_CLOCK_SECONDS)  # so that a later change shows in the time of modification
            for path in files_of(target):
                status = path.stat()
                if digest := self._written.pop(_identity(status), None):
                    self._known[str(path)] = (*_stamp(status), digest)

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[HashedFile]:
        """Create a file that is hashed, and flushed to disk, while it is written from start to end."""
        with HashedFile(path) as file:
            yield file
        self.note(path, file.digest)

    def note(self, path: Path, digest: str) -> None:
        """Keep the digest of a file that another process hashed while it wrote it."""
        self._written[_identity(path.stat())] = digest

    def flush(self, path: Path) -> None:
        """Flush a file that another program wrote to disk, and hash it meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            flushed = pool.submit(flush, path)
            digest = hash_file(path)
            flushed.result()
        self.note(path, digest)

    def save(self) -> None:
        """Keep the hashes for the next process. Not being able to is no failure."""
        if self._cache is not None:
            with contextlib.suppress(OSError, ArtifactError, SpaceError):
                typed_storage.write(self._cache, self._known)


class HashedFile:
    """A file that is hashed, and flushed to disk, while it is written.

    Attributes:
        digest: the SHA-256 of all bytes, in hex; known once the file is closed without an error.
    """

    def __init__(self, path: Path) -> None:
        self.digest = ""
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(2)
        self._hashed: Future[None] | None = None
        self._flushed: Future[None] | None = None
        self._unflushed = 0

    def write(self, data: bytes | np.ndarray) -> None:
        """Append `data`, which must not change afterwards."""
        view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view("u1").data
        self._file.write(view)
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._pool.submit(self._hash.update, view)
        self._unflushed += len(view)
        if self._unflushed > _FLUSHED_AT_ONCE and (self._flushed is None or self._flushed.done()):
            if self._flushed is not None:
                self._flushed.result()
            self._flushed = self._pool.submit(os.fsync, self._file.fileno())
            self._unflushed = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file, self._pool:
            if kind is None:
                for each in (self._hashed, self._flushed):
                    if each is not None:
                        each.result()
                self.digest = self._hash.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what a rename leaves unchanged."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stamp(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
