"""Tars that go into a container or to a machine and come back, piece by piece and without trust in what they say."""

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
class Item:
    """One file to send: its path in the archive, and its content as bytes or as a file with its hash."""

    name: str
    content: bytes | Path
    sha256: str = ""


def packed(items: Iterable[Item]) -> Iterator[bytes]:
    """The items as a tar, whose entries belong to the image's user; folders come before what is in them.

    Raises:
        ArtifactError: a file changes while it is read.
    """
    seen: set[PurePosixPath] = set()
    for item in items:
        for parent in reversed(PurePosixPath(item.name).parents):
            if parent not in seen and parent.name:
                seen.add(parent)
                yield _head(str(parent), tarfile.DIRTYPE, 0)
        if isinstance(item.content, bytes):
            yield _head(item.name, tarfile.REGTYPE, len(item.content))
            yield item.content
            yield _padding(len(item.content))
        else:
            yield from _file(item, item.content)
    yield _END


def _file(item: Item, path: Path) -> Iterator[bytes]:
    size, digest, sent = path.stat().st_size, hashlib.sha256(), 0
    yield _head(item.name, tarfile.REGTYPE, size)
    with path.open("rb") as handle:
        while piece := handle.read(_CHUNK):
            sent += len(piece)
            if sent > size:
                break
            digest.update(piece)
            yield piece
    if sent != size or (item.sha256 and digest.hexdigest() != item.sha256):
        raise ArtifactError(f"{path}: changed while it was sent", "Run the same command again.")
    yield _padding(size)


def _head(name: str, kind: bytes, size: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    entry.uid = entry.gid = names.USER
    return entry.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


class _Stream:
    """Chunks as a file that can be read."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._rest, self._tail = iter(chunks), b"", b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (piece := next(self._chunks, b"")):
            self._rest += piece
        wanted, self._rest = self._rest[:size], self._rest[size:]
        self._tail = (self._tail + wanted)[-len(_END) :]
        return wanted

    def is_whole(self) -> bool:
        """Whether a tar's end has come; tarfile takes one that is cut between two files for a shorter one."""
        while self.read(_CHUNK):
            pass
        return self._tail == _END


def unpack(chunks: Iterable[bytes], name: str, target: Path) -> None:
    """Writes the file or folder `name` of a tar to `target`, which does not exist yet.

    Only plain files and folders below `name` are accepted: a container or machine that was taken over must not reach
    any other place on this one, so there are no links, no devices, no ``..`` and no absolute names.

    Raises:
        ArtifactError: the tar is cut off or holds something else.
    """
    stream = _Stream(chunks)
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:  # type: ignore[call-overload]
            for entry in tar:
                _unpack_entry(tar, entry, name, target)
        if not stream.is_whole():
            raise tarfile.ReadError("it is cut off")
    except tarfile.TarError as error:
        raise ArtifactError(f"{name}: came damaged: {error}") from None
    if not target.exists():
        raise ArtifactError(f"{name}: did not come")


def _unpack_entry(tar: tarfile.TarFile, entry: tarfile.TarInfo, name: str, target: Path) -> None:
    path = PurePosixPath(entry.name)
    # A backslash or a colon is part of a name on Linux, and a way out of the folder on Windows.
    strange = path.is_absolute() or ".." in path.parts or any(char in entry.name for char in "\\:\0")
    if strange or path.parts[:1] != (name,) or not (entry.isreg() or entry.isdir()):
        raise ArtifactError(f"{entry.name!r}: came, and is no plain file of {name!r}")
    place = target.joinpath(*path.parts[1:])
    if entry.isdir():
        place.mkdir(exist_ok=True)
        return
    source = tar.extractfile(entry)
    assert source is not None
    with place.open("xb") as handle:
        shutil.copyfileobj(source, handle, _CHUNK)
    if place.stat().st_size != entry.size:
        raise ArtifactError(f"{entry.name}: came cut off")
