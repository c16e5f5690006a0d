"""The outputs that `kolotune clean` removed, with their hashes: their stages stay done until they are needed again."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from kolotune.foundation import typed_storage

from .layout import RunFolder


def read_cleaned(run: RunFolder) -> dict[str, str]:
    """Return the SHA-256 of each cleaned output by its name in the run folder; without those that exist again."""
    hashes = typed_storage.read_or_none(dict[str, str], run.cleaned) or {}
    return {name: digest for name, digest in hashes.items() if not (run.root / name).exists()}


def add_cleaned(run: RunFolder, hashes: dict[str, str]) -> None:
    """Record outputs that are about to be removed."""
    typed_storage.write(run.cleaned, read_cleaned(run) | hashes)


def forget_cleaned(run: RunFolder, paths: Collection[Path]) -> None:
    """Count these paths as missing from now on, so that their stages run."""
    if run.cleaned.exists():
        hashes = read_cleaned(run)
        typed_storage.write(run.cleaned, {name: hashes[name] for name in hashes if run.root / name not in paths})
