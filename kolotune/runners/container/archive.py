"""Tar archives to and from a container or another machine: streamed, and unpacked without trust in their content."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kolotune.foundation.errors import ArtifactError

from . import names

_CHUNK = 1 << 20
_END = bytes(2 * tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class ArchiveFile:
    """One file to send.

    Attributes:
        name: its path in the archive.
        content: its bytes, or the file to read them from.
        sha256: the expected hash of the file; "" when it is not checked.
    """

    name: str
    content: bytes | Path
    sha256: str = ""


def pack(files: Iterable[ArchiveFile]) -> Iterator[bytes]:
    """Yield a tar of the files, owned by the image's user; folders come before their files.

    Raises:
        ArtifactError: a file changes while it is read.
    """
    folders: set[PurePosixPath] = set()
    for file in files:
        for parent in reversed(PurePosixPath(file.name).parents):
            if parent not in folders and parent.name:
                folders.add(parent)
                yield _header(str(parent), tarfile.DIRTYPE, 0)
        if isinstance(file.content, bytes):
            yield _header(file.name, tarfile.REGTYPE, len(file.content))
            yield file.content
            yield _padding(len(file.content))
        else:
            yield from _pack_path(file, file.content)
    yield _END


def _pack_path(file: ArchiveFile, path: Path) -> Iterator[bytes]:
    size, digest, sent = path.stat().st_size, hashlib.sha256(), 0
    yield _header(file.name, tarfile.REGTYPE, size)
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            sent += len(chunk)
            if sent > size:
                break
            digest.update(chunk)
            yield chunk
    if sent != size or (file.sha256 and digest.hexdigest() != file.sha256):
        raise ArtifactError(f"{path}: changed while it was sent", "Run the same command again.")
    yield _padding(size)


def _header(name: str, kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    entry.uid = entry.gid = names.USER
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


class _ChunkReader:
    """Chunks of bytes as a readable file."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._buffer, self._tail = iter(chunks), b"", b""

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size and (chunk := next(self._chunks, b"")):
            self._buffer += chunk
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        self._tail = (self._tail + data)[-len(_END) :]
        return data

    def is_complete(self) -> bool:
        """Whether the tar has its end; tarfile takes one that is cut between two files for a shorter one."""
        while self.read(_CHUNK):
            pass
        return self._tail == _END


def unpack(chunks: Iterable[bytes], name: str, target: Path) -> None:
    """Write the file or folder `name` of a tar to `target`, which does not exist yet.

    Only plain files and folders below `name` are accepted. A container or machine in wrong hands must not reach any
    other location on this machine, so there are no links, no devices, no ``..`` and no absolute names.

    Raises:
        ArtifactError: the tar is incomplete or contains something else.
    """
    reader = _ChunkReader(chunks)
    try:
        with tarfile.open(fileobj=reader, mode="r|") as tar:  # type: ignore[call-overload]
            for entry in tar:
                _unpack_entry(tar, entry, name, target)
        if not reader.is_complete():
            raise tarfile.ReadError("it is incomplete")
    except tarfile.TarError as error:
        raise ArtifactError(f"{name}: arrived damaged: {error}") from None
    if not target.exists():
        raise ArtifactError(f"{name}: did not arrive")


def _unpack_entry(tar: tarfile.TarFile, entry: tarfile.TarInfo, name: str, target: Path) -> None:
    path = PurePosixPath(entry.name)
    # A backslash or a colon is part of a name on Linux, and a way out of the folder on Windows.
    is_unsafe = path.is_absolute() or ".." in path.parts or any(char in entry.name for char in "\\:\0")
    if is_unsafe or path.parts[:1] != (name,) or not (entry.isreg() or entry.isdir()):
        raise ArtifactError(f"{entry.name!r}: arrived, but is not a plain file of {name!r}")
    destination = target.joinpath(*path.parts[1:])
    if entry.isdir():
        destination.mkdir(exist_ok=True)
        return
    source = tar.extractfile(entry)
    assert source is not None
    with destination.open("xb") as handle:
        shutil.copyfileobj(source, handle, _CHUNK)
    if destination.stat().st_size != entry.size:
        raise ArtifactError(f"{entry.name}: arrived incomplete")
