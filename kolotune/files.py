"""Writing and hashing files so that a reader sees the old or the new one, whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ArtifactError, SpaceError

_CHUNK = 4 << 20


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends without an error.

    The block makes a file or a folder there. It is flushed to disk before the rename and the folder after it,
    so that a power cut leaves the old one or the new one. On an error the temporary one is removed.

    Raises:
        SpaceError: the disk is full.
        ArtifactError: the folder can't be written to.
    """
    temporary = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        flush(temporary)
        if temporary.is_dir() and target.exists():
            # A folder can't be renamed over another: the old one steps aside first.
            aside = target.with_name(f".{target.name}.old")
            remove(aside)
            target.rename(aside)
            temporary.rename(target)
            remove(aside)
        else:
            temporary.replace(target)
        _flush_entry(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        if isinstance(error, OSError):
            raise explained(error, target) from error
        raise


def explained(error: OSError, path: Path) -> SpaceError | ArtifactError:
    """An `OSError` at `path` in the user's words."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(f"{path}: the disk is full")
    return ArtifactError(
        f"{path}: can't be read or written: {error.strerror or error}",
        "Check the name and your rights there; --output-dir chooses another run folder.",
    )


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


class Hasher:
    """SHA-256 of files and folders, each read once as long as size, times and inode stay the same.

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
        stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:4] == stamp and len(known) == 5:
            return str(known[4])
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
