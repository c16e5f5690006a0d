"""Under which name a run was last installed in Ollama."""

from __future__ import annotations

from dataclasses import dataclass

from kolotune.foundation import typed_storage

from .layout import RunFolder


@dataclass(frozen=True)
class InstalledModel:
    """A run's model in Ollama: its name there, and the quantization that was installed."""

    name: str
    quantization: str


def write_installed(run: RunFolder, model: InstalledModel) -> None:
    """Record that a run was installed."""
    typed_storage.write(run.installed, model)


def read_installed(run: RunFolder) -> InstalledModel | None:
    """Return what was installed last; None when the run was never installed."""
    return typed_storage.read_or_none(InstalledModel, run.installed)
