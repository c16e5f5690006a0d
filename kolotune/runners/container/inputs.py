"""Input files for a verb or a job: sent to folders named by their content, so that nothing is sent twice."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path, PurePosixPath

from kolotune.foundation.files import files_of, size_of
from kolotune.foundation.formatting import format_size
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import Reporter

from . import names
from .archive import ArchiveFile
from .path_map import PathMap
from .volume import FileStore, exists

_LARGE_BYTES = 10_000_000


class InputSender:
    """Sends files and folders of the host to a store.

    Args:
        store: the destination.
        hasher: hashes files, and remembers the hashes of those it has read before.
        paths: gets a pair for each file that is sent.
        reporter: shows that a large file is on its way.
    """

    def __init__(self, store: FileStore, hasher: Hasher, paths: PathMap, reporter: Reporter) -> None:
        self._store, self._hasher, self._paths, self._reporter = store, hasher, paths, reporter
        self._sent: dict[Path, PurePosixPath] = {}

    def send(self, host: Path) -> PurePosixPath:
        """Send a file or folder of the host, unless it is there already; return its path in the store."""
        if host not in self._sent:
            self._sent[host] = self._send(host)
            self._paths.add(self._sent[host], host)
        return self._sent[host]

    def _send(self, host: Path) -> PurePosixPath:
        name = _portable_name(host)
        if not host.exists():
            return names.MISSING / uuid.uuid4().hex[:8] / name
        folder = self._store.inputs / names.input_name(name, self._hasher.of(host))
        inside = folder / name
        if not exists(self._store, inside):
            if (size := size_of(host)) >= _LARGE_BYTES:
                self._reporter.doing(f"sending {host} ({format_size(size)})")
            if host.is_dir():
                files = [
                    ArchiveFile(f"{name}/{path.relative_to(host).as_posix()}", path, self._hasher.of(path))
                    for path in files_of(host)
                ]
            else:
                files = [ArchiveFile(name, host, self._hasher.of(host))]
            self._store.send(files, folder)
        return inside

    def send_text(self, name: str, text: str, host: Path) -> PurePosixPath:
        """Send a text in the role of the host's file `host`; return its path in the store."""
        content = text.encode()
        inside = self._store.inputs / names.input_name(name, hashlib.sha256(content).hexdigest()) / name
        if not exists(self._store, inside):
            self._store.send([ArchiveFile(name, content)], inside.parent)
        self._paths.add(inside, host)
        return inside


def _portable_name(host: Path) -> str:
    """Return the file's own name, which messages show and whose ending is its format; a short one if it can't be kept.

    It can't be kept when it is too long or is not valid Unicode.
    """
    try:
        is_portable = 0 < len(host.name.encode()) < 200
    except UnicodeEncodeError:
        is_portable = False
    return host.name if is_portable else f"input{host.suffix[:10].encode('ascii', 'ignore').decode()}"
