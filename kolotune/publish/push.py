"""Pushes a run's result to the hub, in one commit, with its model card. Nothing else in kolotune uploads anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kolotune.base_models import catalog, hub_client
from kolotune.foundation import typed_storage
from kolotune.foundation.errors import (
    AccessError,
    ConfigError,
    HubError,
    KolotuneError,
    ManifestError,
    ModelNotFoundError,
    OfflineError,
)
from kolotune.foundation.files import Hasher
from kolotune.foundation.formatting import format_size
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.secrets import Secret
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.manifest import Manifest, read_manifest
from kolotune.run_folder.records import FileHash
from kolotune.runs.verify import compare_artifacts
from kolotune.weights.adapter import CONFIG

from .model_card import What, model_card

_CARD = "README.md"
_SILENCES = 6  # times as long as a download waits: the hub works on a commit before it answers
_STAGES: dict[What, tuple[str, ...]] = {
    "adapter": ("train",),
    "merged": ("merge",),
    "gguf": ("convert", "quantize", "modelfile"),
}


@dataclass(frozen=True)
class Parcel:
    """What is pushed: name in the repository → the file, or its text."""

    files: dict[str, Path | bytes]

    @property
    def card(self) -> str:
        """The model card."""
        card = self.files[_CARD]
        assert isinstance(card, bytes)
        return card.decode()

    @property
    def size(self) -> int:
        return sum(len(each) if isinstance(each, bytes) else each.stat().st_size for each in self.files.values())


def packed(folder: RunFolder, repository: str, what: What) -> Parcel:
    """What `push` would send. Every file is read and held against the manifest first.

    Raises:
        ManifestError: there is no manifest, no such result, or a file is not the one that was made.
        ConfigError: the repository's name can't be one.
    """
    if not catalog.is_hub_id(repository):
        raise ConfigError(f"{repository}: is no name of a repository", "Give it as owner/name.")
    manifest = read_manifest(folder.require().manifest)
    names = [name for name, each in manifest.artifacts.items() if each.stage in _STAGES[what]]
    if not names:
        raise ManifestError(f"{folder.root}: this run has no {what}", "Push another --what.")
    hasher = Hasher()
    if what == "adapter":
        names.append(folder.relative(folder.prepared))  # its tokenizer has the template that was trained with
    if found := compare_artifacts(manifest, folder, names, hasher):
        raise ManifestError(f"{folder.root}: {found[0]}")
    files = _files(manifest, folder, names)
    listed = {name: _listed(each, hasher) for name, each in files.items()}
    return Parcel({_CARD: model_card(manifest, repository, what, listed).encode(), **files})


def _files(manifest: Manifest, folder: RunFolder, names: list[str]) -> dict[str, Path | bytes]:
    found: dict[str, Path | bytes] = {}
    for name in names:
        for part in manifest.artifacts[name].files:
            path = folder.root / name / part if part else folder.root / name
            if folder.prepared in path.parents and folder.tokenizer not in path.parents:
                continue  # the prepared chats stay here
            if folder.adapter in path.parents and path.name == CONFIG:
                found[path.name] = _adapter_config(path, manifest)
            else:
                found[path.name] = path
    return found


def _adapter_config(path: Path, manifest: Manifest) -> bytes:
    """The adapter's config with the base's name on the hub, where others find it, and no path of this machine."""
    config = typed_storage.read_object(path)
    config["base_model_name_or_path"] = catalog.hub_id(manifest.base.name)
    return (json.dumps(config, indent=2) + "\n").encode()


def _listed(file: Path | bytes, hasher: Hasher) -> FileHash:
    if isinstance(file, bytes):
        return FileHash(len(file), hashlib.sha256(file).hexdigest())
    return FileHash(file.stat().st_size, hasher.of(file))


def push(parcel: Parcel, repository: str, what: What, token: Secret | None, public: bool, reporter: Reporter) -> str:
    """Makes the repository where there is none, and commits the files; returns the commit's address.

    Args:
        parcel: what is sent.
        repository: ``owner/name``.
        what: for the commit's message.
        token: of the hub; None: that of HF_TOKEN or of the hub's login.
        public: whether anyone may see it. A repository that is public already is refused without it.
        reporter: told what is being done.

    Raises:
        AccessError, ModelNotFoundError, OfflineError, HubError: the hub refused, in words that repeat no secret.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub_client.limit_patience(repository, _SILENCES * hub_client.silence())
    api = HfApi(token=token.reveal() if token else None, library_name="kolotune")
    with _explaining(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.model_info(repository).private:
            raise HubError(f"{repository}: is public", "Give --public to push to it, or make it private on the hub.")
        reporter.doing(f"sending {len(parcel.files)} files, {format_size(parcel.size)}")
        operations = [CommitOperationAdd(name, file) for name, file in parcel.files.items()]
        info = api.create_commit(repository, operations, commit_message=f"{what}, by kolotune")
    return str(info.commit_url)


@contextmanager
def _explaining(repository: str) -> Iterator[None]:
    """Turns what the hub's client raises into the user's words."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except KolotuneError:
        raise
    except (errors.HfHubHTTPError, httpx2.HTTPError, RuntimeError, ValueError, OSError) as error:
        raise _in_words(repository, hub_client.status_of(error), error) from None


def _in_words(repository: str, code: int, error: Exception) -> KolotuneError:
    from huggingface_hub import errors

    if code == 401:
        return AccessError(f"{repository}: the hub wants a login, or does not know the token (401)")
    if code == 403:
        return AccessError(
            f"{repository}: the token may not write there (403)", "Use a token with the right to write to this owner."
        )
    if code == 404:
        return ModelNotFoundError(
            f"{repository}: the hub has no such repository, or this account may not see it", "Check the owner's name."
        )
    if code in (409, 412):
        return HubError(f"{repository}: was changed by someone else at the same time ({code}); nothing was committed")
    if code in (413, 507):
        return HubError(f"{repository}: the hub has no room for this ({code})", "Push less, or raise the quota there.")
    if code >= 500 or code == 429:
        return OfflineError(f"{repository}: the hub answered {code}", "Try again later; what has arrived is kept.")
    if code:
        return HubError(f"{repository}: the hub refused ({code})")
    if isinstance(error, errors.LocalTokenNotFoundError):
        return AccessError(f"{repository}: pushing needs a token of the hub")
    if isinstance(error, ValueError):
        return HubError(f"{repository}: the hub's answer can't be used: {str(error).splitlines()[0]}")
    return hub_client.without_answer(repository, error)
