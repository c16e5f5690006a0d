"""What a stage is: the protocol that each module in `stages/` follows, and the context that it works in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kolotune.foundation.config import Config
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject

from .layout import RunFolder


@dataclass(frozen=True)
class Context:
    """What a stage works with.

    Attributes:
        config: the resolved options.
        run: the run folder.
        base: the folder of the base model.
        source: an adapter or merged folder made elsewhere (`kolotune export`), in place of the run's own.
        hasher: reads each file once.
    """

    config: Config
    run: RunFolder
    base: Path
    source: Path | None = None
    hasher: Hasher = field(default_factory=Hasher, compare=False)


class Stage(Protocol):
    """One step of the pipeline; each is a module in `stages/` with these names."""

    NAME: str
    DOING: str

    def options(self, config: Config) -> JsonObject:
        """Return the options that the outputs depend on."""

    def inputs(self, context: Context) -> dict[str, Path]:
        """Return the files and folders that the stage reads, by their labels in records and messages."""

    def outputs(self, context: Context) -> list[Path]:
        """Return the files and folders that the stage makes."""

    def packages(self) -> Sequence[str]:
        """Return the packages whose version the outputs depend on."""

    def preflight(self, context: Context, reporter: Reporter) -> None:
        """Raise now what could only fail later; called before any stage runs."""

    def run(self, context: Context, reporter: Reporter) -> JsonObject:
        """Make the outputs; return the facts for the record."""
