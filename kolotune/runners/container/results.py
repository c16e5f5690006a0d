"""Run folders to and from a container or another machine; only what has changed is fetched."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from kolotune.foundation import typed_storage
from kolotune.foundation.files import files_of, remove, replacing
from kolotune.run_folder.layout import RunFolder

from .archive import ArchiveFile
from .path_map import PathMap
from .volume import FileStore

_SMALL_BYTES = 100_000


def send_run(store: FileStore, host: RunFolder, target: PurePosixPath, rewritten: Mapping[Path, str]) -> None:
    """Send a run folder that was made on the host, so that its work continues there.

    Args:
        store: the destination.
        host: the run folder.
        target: its folder in the store.
        rewritten: files that contain paths, with their text for the other side.
    """
    files = []
    for path in files_of(host.root):
        relative = host.relative(path)
        if not _is_local(relative, host, with_checkpoints=True) and path != host.brought:
            files.append(ArchiveFile(relative, rewritten[path].encode() if path in rewritten else path))
    store.send(files, target)


def fetch_run(
    store: FileStore, source: PurePosixPath, host: RunFolder, paths: PathMap, *, with_checkpoints: bool = False
) -> list[str]:
    """Fetch a run's results and records; leave what has not changed as it is.

    Each entry of the run folder, and of its state folder, replaces the old one as a whole. Records come last, so that
    they never promise what has not arrived.

    Args:
        store: where the run is.
        source: its folder there.
        host: the run folder here.
        paths: translates the paths in fetched files.
        with_checkpoints: also fetch the training's checkpoints.

    Returns:
        The names of the changed entries, relative to the run folder.

    Raises:
        ArtifactError: what arrived is damaged.
        SpaceError: the host's disk is full.
    """
    listed = store.ask(dict[str, list[int]], "list", source)
    if not listed:
        return []
    entries: dict[str, dict[str, list[int]]] = {}
    for name, status in listed.items():
        if not _is_local(name, host, with_checkpoints):
            entries.setdefault(_entry_of(name, host), {})[name] = status
    known = _fetched_before(host)
    changed = []
    for entry in sorted(entries, key=lambda name: (_is_record(name, host), name)):
        if not _is_unchanged(entries[entry], entry, host, known):
            with replacing(host.root / entry) as partial:
                store.fetch(source / entry, partial)
                paths.rewrite(partial, host.root / entry, host)
                if not _is_same(partial, host.root / entry):
                    changed.append(entry)
    for entry in {_entry_of(name, host) for name in known} - set(entries):
        if not _is_local(entry, host, with_checkpoints=False):
            remove(host.root / entry)
    fetched = {name: status for files in entries.values() for name, status in files.items()}
    typed_storage.write(host.brought, {name: [*status, *_stamp(host.root / name)] for name, status in fetched.items()})
    return changed


def _entry_of(name: str, run: RunFolder) -> str:
    """Return the entry that a file belongs to and that is replaced as a whole: of the root, or of the state folder."""
    parts = PurePosixPath(name).parts
    return "/".join(parts[: 2 if parts[0] == run.state.name else 1])


def _is_local(name: str, run: RunFolder, with_checkpoints: bool) -> bool:
    """Whether a file belongs to the machine that does the work, and is not copied."""
    local = [run.lock, run.lock_holder, run.hash_cache, run.brought, run.launched, run.machines]
    if not with_checkpoints:
        local.append(run.checkpoints)
    parts = PurePosixPath(name).parts
    is_partial = any(part.startswith(".") and part.endswith((".partial", ".old")) for part in parts)
    return is_partial or _entry_of(name, run) in [run.relative(path) for path in local]


def _is_record(entry: str, run: RunFolder) -> bool:
    return entry.startswith(f"{run.state.name}/") and entry.endswith(".json")


def _fetched_before(run: RunFolder) -> dict[str, list[int]]:
    with contextlib.suppress(OSError, typed_storage.StorageError):
        return typed_storage.read(dict[str, list[int]], run.brought)
    return {}


def _is_same(new: Path, old: Path) -> bool:
    """Whether a small file, such as the config that each run writes again, has the content of the old one."""
    if not (new.is_file() and old.is_file()) or new.stat().st_size > _SMALL_BYTES:
        return False
    return new.read_bytes() == old.read_bytes()


def _is_unchanged(
    files: Mapping[str, Sequence[int]], entry: str, run: RunFolder, known: Mapping[str, Sequence[int]]
) -> bool:
    path = run.root / entry
    if not path.exists() or {run.relative(file) for file in files_of(path)} != set(files):
        return False
    return all(known.get(name) == [*status, *_stamp(run.root / name)] for name, status in files.items())


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
