"""Writing files so that a reader sees the old or the new one, whole; removing and measuring them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import ArtifactError, SpaceError
from .formatting import format_size

_FEW_INODES = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Replace a file or folder at the end of the block, if the block raises no error.

    Yields a temporary path beside `target`, where the block makes a file or a folder. It is flushed to disk before
    the rename and the parent folder after it, so that a power cut leaves the old one or the new one. On an error the
    temporary one is removed.

    Raises:
        SpaceError: the disk is full.
        ArtifactError: the folder cannot be written to.
    """
    temporary, old = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not target.exists():  # a process was killed between the two renames below
            old.rename(target)
        remove(temporary)
        yield temporary
        flush(temporary)
        if temporary.is_dir() and target.exists():
            # A folder cannot be renamed over another: the old one is moved away first.
            remove(old)
            target.rename(old)
            temporary.rename(target)
            remove(old)
        else:
            temporary.replace(target)
        _flush_entry(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            remove(temporary)
        if isinstance(error, OSError):
            raise explained(error, target) from error
        for number in _FULL:  # libraries in Rust, such as safetensors, have the number in their text only
            if isinstance(error, Exception) and f"(os error {number})" in str(error):
                raise explained(OSError(number, os.strerror(number)), target) from error
        raise


def explained(error: OSError, path: Path) -> SpaceError | ArtifactError:
    """Return an `OSError` at `path` as an error for the user."""
    if error.errno in _FULL:
        if _is_out_of_inodes(path):
            return SpaceError(
                f"{path}: the disk cannot hold more files (no inodes are left)",
                "Remove some files there, or choose another --output-dir.",
            )
        return SpaceError(f"{path}: the disk is full")
    return ArtifactError(
        f"{path}: can't be read or written: {error.strerror or error}",
        "Check the name and your permissions; --output-dir chooses another run folder.",
    )


def _is_out_of_inodes(path: Path) -> bool:
    """Whether a disk that refused a file has (almost) no inodes left; removing the partial file may have freed some."""
    if sys.platform == "win32":  # which has no such limit
        return False
    while not path.exists():
        path = path.parent
    with contextlib.suppress(OSError):
        status = os.statvfs(path)
        return status.f_files > 0 and status.f_favail < _FEW_INODES
    return False


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file, or every file of a folder, to disk."""
    for file in files_of(path):
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    if path.is_dir():
        for folder in [path, *(entry for entry in path.rglob("*") if entry.is_dir())]:
            _flush_entry(folder)


def _flush_entry(folder: Path) -> None:
    if sys.platform == "win32":  # Windows cannot open folders; its renames are ordered
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, newlines unchanged; the old content or all of the new one."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def files_of(path: Path) -> list[Path]:
    """Return the file itself, or all files below a folder in a fixed order, hidden ones and links included."""
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    return [path]


def size_of(path: Path) -> int:
    """Return the bytes in a file or a folder."""
    return sum(each.stat().st_size for each in files_of(path))


def free_space(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int) -> None:
    """Check before work begins that a disk has space for its result.

    Args:
        folder: is on the disk; need not exist yet.
        needed: bytes.

    Raises:
        SpaceError: they are not free.
    """
    free = free_space(folder.absolute())
    if needed > free:
        raise SpaceError(
            f"{folder}: about {format_size(needed)} are needed there, but only {format_size(free)} are free",
            f"Free {format_size(needed - free)}, or choose a folder on another disk.",
        )
