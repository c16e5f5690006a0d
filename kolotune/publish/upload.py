"""What is uploaded: the files of a result, verified against the manifest, and the model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kolotune.base_models import catalog, hub
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ConfigError, ManifestError
from kolotune.foundation.hashing import Hasher
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import Manifest, read_manifest
from kolotune.run_folder.records import FileHash
from kolotune.runs.verify import compare_artifacts
from kolotune.weights import adapter_folder

from .model_card import ResultKind, make_model_card

_CARD = "README.md"
_STAGES: dict[ResultKind, tuple[str, ...]] = {
    "adapter": ("train",),
    "merged": ("merge",),
    "gguf": ("convert", "quantize", "modelfile"),
}


@dataclass(frozen=True)
class Upload:
    """The files to upload, as path or content, by their name in the repository."""

    files: dict[str, Path | bytes]

    @property
    def card(self) -> str:
        """The model card."""
        card = self.files[_CARD]
        assert isinstance(card, bytes)
        return card.decode()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(file) if isinstance(file, bytes) else file.stat().st_size for file in self.files.values())


def collect_upload(folder: RunFolder, repository: str, kind: ResultKind) -> Upload:
    """Collect the files of a result; each is read and compared with the manifest first.

    Raises:
        ManifestError: the run has no manifest or no such result, or a file differs from the manifest.
        ConfigError: the repository's name is not valid.
    """
    if not hub.is_hub_id(repository):
        raise ConfigError(f"{repository}: not a valid repository name", "Write it as owner/name.")
    manifest = read_manifest(folder.require().manifest)
    names = [name for name, artifact in manifest.artifacts.items() if artifact.stage in _STAGES[kind]]
    if not names:
        raise ManifestError(f"{folder.root}: this run has no {kind}", "Push another --what.")
    hasher = Hasher()
    if kind == "adapter":
        names.append(folder.relative(folder.prepared))  # for its tokenizer, with the template used in training
    if differences := compare_artifacts(manifest, folder, names, hasher):
        raise ManifestError(f"{folder.root}: {differences[0]}")
    files = dict(_files(manifest, folder, names))
    hashes = {name: _file_hash(file, hasher) for name, file in files.items()}
    return Upload({_CARD: make_model_card(manifest, repository, kind, hashes).encode(), **files})


def _files(manifest: Manifest, folder: RunFolder, names: list[str]) -> Iterator[tuple[str, Path | bytes]]:
    for name in names:
        for file in manifest.artifacts[name].files:
            path = folder.root / name / file if file else folder.root / name
            if folder.prepared in path.parents and folder.tokenizer not in path.parents:
                continue  # prepared chats are never uploaded
            if folder.adapter in path.parents and path.name == adapter_folder.FILE:
                yield path.name, _adapter_config(path, manifest)
            else:
                yield path.name, path


def _adapter_config(path: Path, manifest: Manifest) -> bytes:
    """Return the adapter's config with the base model's name on the hub in place of a path on this machine."""
    config = typed_storage.read_object(path)
    config["base_model_name_or_path"] = catalog.hub_id(manifest.base.name)
    return (json.dumps(config, indent=2) + "\n").encode()


def _file_hash(file: Path | bytes, hasher: Hasher) -> FileHash:
    if isinstance(file, bytes):
        return FileHash(len(file), hashlib.sha256(file).hexdigest())
    return FileHash(file.stat().st_size, hasher.of(file))
