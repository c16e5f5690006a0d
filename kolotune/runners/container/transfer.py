"""Files between the host and the container's volume: sent once, brought out when they changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from kolotune.foundation.errors import KolotuneError, SpaceError
from kolotune.foundation.files import Hasher, files_of, remove, replacing, size_of, write_json
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.run_folder.layout import RunFolder

from . import archive, names
from .archive import Item
from .docker import SPACE_HINT, Docker, Found
from .paths import Paths
from .process import output_of

_LARGE_BYTES = 10_000_000
_BLOCK_BYTES = 4096  # what a file takes on a disk is a whole number of these
_SMALL_BYTES = 100_000
_MODULE = "kolotune.runners.container.inside"
_DOING = "the exchange of files"


class Store(Protocol):
    """Folders elsewhere, beside a kolotune that can be asked about them."""

    @property
    def inputs(self) -> PurePosixPath:
        """Where files are sent to, each into a folder of its own."""

    def ask(self, command: str, *arguments: object) -> Any:
        """What `inside` answers there."""

    def send(self, items: Iterable[Item], target: PurePosixPath) -> None:
        """Puts a folder of files at `target`, whole or not at all."""

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        """Takes a file or folder out to `target`, which does not exist yet."""


@dataclass(frozen=True)
class Volume:
    """The container's volume."""

    docker: Docker
    found: Found

    @property
    def inputs(self) -> PurePosixPath:
        """Where files are sent to, each into a folder of its own."""
        return names.INPUTS

    def ask(self, command: str, *arguments: object) -> Any:
        """What `inside` answers."""
        argv = [names.PYTHON, "-P", "-m", _MODULE, command, *map(str, arguments)]
        return json.loads(output_of(self.docker, self.found, argv, _DOING))

    def send(self, items: Iterable[Item], target: PurePosixPath) -> None:
        """Puts a folder of files at `target`, whole or not at all.

        Raises:
            SpaceError: the volume has no room for it.
            ContainerLostError: the container, or Docker, went away meanwhile.
            ArtifactError: a file changes meanwhile.
        """
        name = self.found.name
        partial = f".{uuid.uuid4().hex}.partial"
        inside = [Item(f"{partial}/{item.name}", item.content, item.sha256) for item in items]
        needed, free = _on_disk(inside), int(self.ask("free", names.VOLUME))
        size = format_size(needed)
        if needed > free:
            raise SpaceError(
                f"container {name}: {size} are to be sent there, but only {format_size(free)} are free on its volume",
                SPACE_HINT,
            )
        try:
            with self.docker.working(self.found, _DOING, f"send {size} to {name}"):
                self.docker.api.put_archive(self.found.id, str(names.VOLUME), archive.packed(inside))
            self.ask("settle", names.VOLUME / partial, target)
        except BaseException:
            with contextlib.suppress(KolotuneError):
                self.ask("remove", names.VOLUME / partial)
            raise

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        """Takes a file or folder out to `target`, which does not exist yet."""
        with self.docker.working(self.found, _DOING, f"bring out {source.name}"):
            chunks, _ = self.docker.api.get_archive(self.found.id, str(source))
            archive.unpack(chunks, source.name, target)


def _on_disk(items: Iterable[Item]) -> int:
    """Bytes that files of these contents take on a disk."""
    sizes = (len(item.content) if isinstance(item.content, bytes) else item.content.stat().st_size for item in items)
    return sum(-(-size // _BLOCK_BYTES) * _BLOCK_BYTES for size in sizes)


class Sender:
    """Sends files and folders into places that are named by their content, so that nothing is sent twice.

    Args:
        volume: where they go.
        hasher: knows the hashes of what it has read before.
        paths: learns which path inside stands for which one on the host.
        reporter: told when it may take a while.
    """

    def __init__(self, volume: Store, hasher: Hasher, paths: Paths, reporter: Reporter) -> None:
        self._volume, self._hasher, self._paths, self._reporter = volume, hasher, paths, reporter
        self._settled: dict[Path, PurePosixPath] = {}

    def place(self, host: Path) -> PurePosixPath:
        """The path inside of a host's file or folder, which is sent unless it is there."""
        if host not in self._settled:
            self._settled[host] = self._send(host)
            self._paths.add(self._settled[host], host)
        return self._settled[host]

    def _send(self, host: Path) -> PurePosixPath:
        if not host.exists():
            return names.MISSING / uuid.uuid4().hex[:8] / _name(host)
        folder = self._volume.inputs / names.input_name(_name(host), self._hasher.of(host))
        inside = folder / _name(host)
        if self._volume.ask("have", inside) != [True]:
            if (size := size_of(host)) >= _LARGE_BYTES:
                self._reporter.doing(f"sending {host} ({format_size(size)})")
            if host.is_dir():
                items = [
                    Item(f"{_name(host)}/{path.relative_to(host).as_posix()}", path, self._hasher.of(path))
                    for path in files_of(host)
                ]
            else:
                items = [Item(_name(host), host, self._hasher.of(host))]
            self._volume.send(items, folder)
        return inside

    def place_text(self, name: str, text: str, host: Path) -> PurePosixPath:
        """The path inside of a text that stands for the host's file `host`."""
        content = text.encode()
        inside = self._volume.inputs / names.input_name(name, hashlib.sha256(content).hexdigest()) / name
        if self._volume.ask("have", inside) != [True]:
            self._volume.send([Item(name, content)], inside.parent)
        self._paths.add(inside, host)
        return inside


def _name(host: Path) -> str:
    """The file's own name, which messages repeat and whose ending tells the format; a short one if it can't be kept."""
    try:
        plain = 0 < len(host.name.encode()) < 200
    except UnicodeEncodeError:
        plain = False
    return host.name if plain else f"input{host.suffix[:10].encode('ascii', 'ignore').decode()}"


def seed(volume: Volume, host: RunFolder, target: PurePosixPath, rewritten: Mapping[Path, str]) -> None:
    """Sends a run folder that was made on the host, so that its work goes on inside.

    Args:
        volume: where it goes.
        host: the run folder.
        target: its folder inside.
        rewritten: files that name paths, with the text that names the paths inside.
    """
    items = []
    for path in files_of(host.root):
        relative = host.relative(path)
        if not _stays(relative, host, with_checkpoints=True) and path != host.brought:
            items.append(Item(relative, rewritten[path].encode() if path in rewritten else path))
    volume.send(items, target)


def bring_out(
    volume: Store, source: PurePosixPath, host: RunFolder, paths: Paths, *, with_checkpoints: bool = False
) -> list[str]:
    """Brings a run folder's results and records to the host; what has not changed is left as it is.

    Every file or folder at the root of the run folder, and below its state, takes the place of the old one whole.
    Records come last, so that they never promise what has not come.

    Args:
        volume: where the run is.
        source: its folder there.
        host: the run folder here.
        paths: turns the paths inside that files name into the host's.
        with_checkpoints: bring the training's checkpoints too.

    Returns:
        The names of what came, relative to the run folder.

    Raises:
        ArtifactError: what came is not what it should be.
        SpaceError: the host's disk is full.
    """
    listed: dict[str, list[int]] = volume.ask("list", source)
    if not listed:
        return []
    units: dict[str, dict[str, list[int]]] = {}
    for name, status in listed.items():
        if not _stays(name, host, with_checkpoints):
            units.setdefault(_unit(name, host), {})[name] = status
    known = _brought(host)
    came = []
    for unit in sorted(units, key=lambda each: (_is_record(each, host), each)):
        if not _is_unchanged(units[unit], unit, host, known):
            with replacing(host.root / unit) as partial:
                volume.fetch(source / unit, partial)
                paths.rewrite(partial, host.root / unit, host)
                if not _is_same(partial, host.root / unit):
                    came.append(unit)
    for unit in {_unit(name, host) for name in known} - set(units):
        if not _stays(unit, host, with_checkpoints=False):
            remove(host.root / unit)
    write_json(host.brought, {name: [*status, *_stamp(host.root / name)] for name, status in _flat(units).items()})
    return came


def _flat(units: Mapping[str, Mapping[str, list[int]]]) -> dict[str, list[int]]:
    return {name: status for files in units.values() for name, status in files.items()}


def _unit(name: str, run: RunFolder) -> str:
    """What is replaced at once: an entry of the root, or one of the state."""
    parts = PurePosixPath(name).parts
    return "/".join(parts[: 2 if parts[0] == run.state.name else 1])


def _stays(name: str, run: RunFolder, with_checkpoints: bool) -> bool:
    """Whether a file belongs to the place where the work is done."""
    local = [run.lock, run.lock_holder, run.hash_cache, run.brought, run.launched, run.machines]
    if not with_checkpoints:
        local.append(run.checkpoints)
    parts = PurePosixPath(name).parts
    half_made = any(part.startswith(".") and part.endswith((".partial", ".old")) for part in parts)
    return half_made or _unit(name, run) in [run.relative(path) for path in local]


def _is_record(unit: str, run: RunFolder) -> bool:
    return unit.startswith(f"{run.state.name}/") and unit.endswith(".json")


def _brought(run: RunFolder) -> dict[str, list[int]]:
    with contextlib.suppress(OSError, ValueError):
        loaded = json.loads(run.brought.read_text(encoding="utf-8"))
        return loaded if isinstance(loaded, dict) else {}
    return {}


def _is_same(new: Path, old: Path) -> bool:
    """Whether a small file, such as the config that each run writes anew, says what the old one said."""
    if not (new.is_file() and old.is_file()) or new.stat().st_size > _SMALL_BYTES:
        return False
    return new.read_bytes() == old.read_bytes()


def _is_unchanged(
    files: Mapping[str, Sequence[int]], unit: str, run: RunFolder, known: Mapping[str, Sequence[int]]
) -> bool:
    place = run.root / unit
    if not place.exists() or {run.relative(path) for path in files_of(place)} != set(files):
        return False
    return all(known.get(name) == [*status, *_stamp(run.root / name)] for name, status in files.items())


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
