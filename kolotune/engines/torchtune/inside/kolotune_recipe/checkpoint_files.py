"""Checkpoints on the disk: their names, and whether one is whole. The driver imports this too, without PyTorch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ADAPTER, STATE, FACTS = "adapter_model.safetensors", "state.safetensors", "checkpoint.txt"
_NAME = "epoch-"
_CHUNK = 4 << 20


def folder_of(root: Path, epoch: int) -> Path:
    """Return the folder of the checkpoint after `epoch` epochs."""
    return root / f"{_NAME}{epoch:06d}"


def by_epoch(root: Path) -> list[Path]:
    """Return the checkpoints, newest first, by the number in their name, never by time."""
    if not root.is_dir():
        return []
    found = [path for path in root.glob(f"{_NAME}*") if path.is_dir() and path.name.removeprefix(_NAME).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_NAME)), reverse=True)


def newest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest whole checkpoint and its facts; None when there is none."""
    for folder in by_epoch(root):
        facts = facts_if_whole(folder)
        if facts is not None:
            return folder, facts
    return None


def facts_if_whole(folder: Path) -> dict[str, Any] | None:
    """Return the facts of a checkpoint whose files were written together; None when it is damaged."""
    try:
        digest_of_facts, _, text = (folder / FACTS).read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest_of_facts:
            return None
        facts: dict[str, Any] = json.loads(text)
        same = all(hash_of(folder / name) == digest for name, digest in facts["sha256"].items())
        proper = facts["sha256"].keys() == {ADAPTER, STATE} and isinstance(facts["identity"], dict)
        numbers = isinstance(facts["step"], int) and folder.name == folder_of(folder, facts["epoch"]).name
        return facts if same and proper and numbers else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
