"""Writing and hashing files so that a reader sees the old or the new one, whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import ArtifactError, SpaceError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    import numpy as np

T = TypeVar("T")
_CHUNK = 4 << 20
_FLUSHED_AT_ONCE = 128 << 20
_FEW_INODES = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOCK_SECONDS = 0.012  # longer than a tick of the clock that files are stamped by
# Digests of files that this process has just written: by device, inode, size and time until they have their last
# name, then by path with the file's stamp.
_written: dict[tuple[int, ...], str] = {}
_settled: dict[str, list[Any]] = {}


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends without an error.

    The block makes a file or a folder there. It is flushed to disk before the rename and the folder after it,
    so that a power cut leaves the old one or the new one. On an error the temporary one is removed.

    Raises:
        SpaceError: the disk is full.
        ArtifactError: the folder can't be written to.
    """
    temporary, aside = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if aside.exists() and not target.exists():  # a process was killed between the two renames below
            aside.rename(target)
        remove(temporary)
        yield temporary
        flush(temporary)
        if temporary.is_dir() and target.exists():
            # A folder can't be renamed over another: the old one steps aside first.
            remove(aside)
            target.rename(aside)
            temporary.rename(target)
            remove(aside)
        else:
            temporary.replace(target)
        _flush_entry(target.parent)
        _settle(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        if isinstance(error, OSError):
            raise explained(error, target) from error
        for number in _FULL:  # libraries in Rust, safetensors for one, say so in their text only
            if isinstance(error, Exception) and f"(os error {number})" in str(error):
                raise explained(OSError(number, os.strerror(number)), target) from error
        raise


def explained(error: OSError, path: Path) -> SpaceError | ArtifactError:
    """An `OSError` at `path` in the user's words."""
    if error.errno in _FULL:
        if _is_out_of_inodes(path):
            return SpaceError(
                f"{path}: the disk holds as many files as it can (no inodes are left)",
                "Remove some files there, or choose another --output-dir.",
            )
        return SpaceError(f"{path}: the disk is full")
    return ArtifactError(
        f"{path}: can't be read or written: {error.strerror or error}",
        "Check the name and your rights there; --output-dir chooses another run folder.",
    )


def _is_out_of_inodes(path: Path) -> bool:
    """Whether a disk that has refused a file has no place for one more; what was given up may have left some."""
    if not hasattr(os, "statvfs"):
        return False
    while not path.exists():
        path = path.parent
    with contextlib.suppress(OSError):
        found = os.statvfs(path)
        return found.f_files > 0 and found.f_favail < _FEW_INODES
    return False


def remove(path: Path) -> None:
    """Removes a file or a folder; nothing happens when there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Forces a file, or every file of a folder, from memory to disk."""
    for each in files_of(path):
        with each.open("rb+") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        for folder in [path, *(each for each in path.rglob("*") if each.is_dir())]:
            _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    if os.name == "nt":  # Windows can't open folders; its rename is already ordered
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(target: Path, text: str) -> None:
    """Writes `text` as UTF-8 with newlines as they stand; whole or not at all."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(target: Path, value: Any) -> None:
    """Writes `value` as JSON; whole or not at all."""
    write_text(target, json.dumps(value, indent=1) + "\n")


def files_of(path: Path) -> list[Path]:
    """The file itself, or all files below a folder in a fixed order; hidden ones and links count too."""
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    return [path]


def size_of(path: Path) -> int:
    """Bytes in a file or a folder."""
    return sum(each.stat().st_size for each in files_of(path))


class Stream:
    """A new file, written from its beginning to its end, that is hashed and brought to the disk meanwhile.

    Within `replacing`, so that what it hashed need not be read again: see `Hasher`.
    """

    def __init__(self, path: Path) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(2)
        self._hashed: Future[None] | None = None
        self._flushed: Future[None] | None = None
        self._unflushed = 0

    def write(self, data: bytes | np.ndarray) -> None:
        """Appends; `data` must not be changed afterwards."""
        view = memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view("u1").data
        self._file.write(view)
        if self._hashed is not None:
            self._hashed.result()
        self._hashed = self._pool.submit(self._digest.update, view)
        self._unflushed += len(view)
        if self._unflushed > _FLUSHED_AT_ONCE and (self._flushed is None or self._flushed.done()):
            if self._flushed is not None:
                self._flushed.result()
            self._flushed = self._pool.submit(os.fsync, self._file.fileno())
            self._unflushed = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file, self._pool:
            if kind is None:
                for each in (self._hashed, self._flushed):
                    if each is not None:
                        each.result()
                self._file.flush()
                _written[_identity(os.fstat(self._file.fileno()))] = self._digest.hexdigest()


def hash_and_flush(path: Path) -> None:
    """Hashes a file that another program wrote within `replacing` while it is brought to the disk; see `Hasher`."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush, path)
        digest = hash_file(path)
        flushed.result()
    _written[_identity(path.stat())] = digest


def _settle(target: Path) -> None:
    """Keeps the digests of what streams wrote into `target`, under the names that the files have now."""
    if not _written:
        return
    # A change from here on must show in the stamp, whose clock is coarse.
    time.sleep(_CLOCK_SECONDS)
    for path in files_of(target):
        status = path.stat()
        if digest := _written.pop(_identity(status), None):
            _settled[str(path)] = [*_stamp(status), digest]


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What a rename leaves as it is."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def in_order(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of `tasks`, in their order, from as many threads as there are cores; few of them wait in memory."""
    from concurrent.futures import ThreadPoolExecutor

    threads = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(threads) as pool:
        yield from results(pool, tasks, 4 * threads)


def results(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """What the threads of a pool make of tasks, in their order.

    Args:
        pool: the threads.
        tasks: taken as they are needed.
        ahead: how many, at most, are begun or done before their result is asked for.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for each in waiting:
            each.cancel()


class Hasher:
    """SHA-256 of files and folders, each read once as long as size, times and inode stay the same.

    What this process has just written (a `Stream`, `hash_and_flush`) was hashed on its way and is not read again.

    Args:
        cache: hashes of an earlier process, to trust what has not been touched since; None: this process's only.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache_file = cache
        self._known: dict[str, list[Any]] = {}
        if cache is not None:
            with contextlib.suppress(OSError, ValueError):
                loaded = json.loads(cache.read_text(encoding="utf-8"))
                self._known = loaded if isinstance(loaded, dict) else {}

    def of(self, path: Path) -> str:
        """The hex digest of a file's bytes, or of a folder's file names and bytes; "" if there is nothing."""
        if path.is_dir():
            total = hashlib.sha256()
            for each in files_of(path):
                total.update(f"{each.relative_to(path).as_posix()}\0{self._file(each)}\n".encode())
            return total.hexdigest()
        return self._file(path) if path.is_file() else ""

    def _file(self, path: Path) -> str:
        status = path.stat()
        stamp = _stamp(status)
        for known in (self._known.get(str(path)), _settled.get(str(path))):
            if isinstance(known, list) and known[:4] == stamp and len(known) == 5:
                digest = str(known[4])
                break
        else:
            digest = hash_file(path)
        self._known[str(path)] = [*stamp, digest]
        return digest

    def save(self) -> None:
        """Keeps the hashes for the next process; that it can't is no reason to fail."""
        if self._cache_file is not None:
            with contextlib.suppress(OSError, ArtifactError, SpaceError):
                write_json(self._cache_file, self._known)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
