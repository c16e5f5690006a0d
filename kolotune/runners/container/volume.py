"""Files on the other side: what a store can do, and the container's volume as one."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import KolotuneError, SpaceError
from kolotune.foundation.formatting import format_size

from . import archive, names
from .archive import ArchiveFile
from .docker import SPACE_HINT, Container, Docker
from .process import output_of

T = TypeVar("T")
INSIDE_MODULE = "kolotune.runners.container.inside"
_BLOCK_BYTES = 4096  # a file occupies a whole number of these on a disk
_EXCHANGE = "the exchange of files"


class FileStore(Protocol):
    """Folders on the other side, next to a kolotune that answers questions about them."""

    @property
    def inputs(self) -> PurePosixPath:
        """The folder of input files, each in a folder of its own."""

    def ask(self, kind: type[T], command: str, *arguments: object) -> T:
        """Run a command of `inside` there; return its answer, which must be a `kind`."""

    def send(self, files: Iterable[ArchiveFile], target: PurePosixPath) -> None:
        """Make the folder `target` of files, completely or not at all."""

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        """Copy a file or folder to `target` on the host, which does not exist yet."""


def exists(store: FileStore, path: PurePosixPath) -> bool:
    """Whether a file or folder exists in the store."""
    return store.ask(list[bool], "have", path) == [True]


@dataclass(frozen=True)
class Volume:
    """The container's volume, a `FileStore`."""

    docker: Docker
    container: Container

    @property
    def inputs(self) -> PurePosixPath:
        return names.INPUTS

    def ask(self, kind: type[T], command: str, *arguments: object) -> T:
        argv = [names.PYTHON, "-P", "-m", INSIDE_MODULE, command, *map(str, arguments)]
        return typed_storage.parse(kind, output_of(self.docker, self.container, argv, _EXCHANGE))

    def send(self, files: Iterable[ArchiveFile], target: PurePosixPath) -> None:
        """See `FileStore.send`.

        Raises:
            SpaceError: the volume has too little free space.
            ContainerLostError: the container or Docker went away meanwhile.
            ArtifactError: a file changes meanwhile.
        """
        name = self.container.name
        partial = f".{uuid.uuid4().hex}.partial"
        parts = [ArchiveFile(f"{partial}/{file.name}", file.content, file.sha256) for file in files]
        needed, free = _bytes_on_disk(parts), self.ask(int, "free", names.VOLUME)
        size = format_size(needed)
        if needed > free:
            raise SpaceError(
                f"container {name}: {size} of files don't fit on its volume, which has {format_size(free)} free",
                SPACE_HINT,
            )
        try:
            with self.docker.during(_EXCHANGE, self.container, f"send {size} to {name}"):
                self.docker.api.put_archive(self.container.id, str(names.VOLUME), archive.pack(parts))
            self.ask(bool, "settle", names.VOLUME / partial, target)
        except BaseException:
            with contextlib.suppress(KolotuneError):
                self.ask(type(None), "remove", names.VOLUME / partial)
            raise

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        with self.docker.during(_EXCHANGE, self.container, f"fetch {source.name}"):
            chunks, _ = self.docker.api.get_archive(self.container.id, str(source))
            archive.unpack(chunks, source.name, target)


def _bytes_on_disk(files: Iterable[ArchiveFile]) -> int:
    sizes = (len(file.content) if isinstance(file.content, bytes) else file.content.stat().st_size for file in files)
    return sum(-(-size // _BLOCK_BYTES) * _BLOCK_BYTES for size in sizes)
