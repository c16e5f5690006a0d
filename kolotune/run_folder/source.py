"""Which adapter or merged model a run folder exports in place of an adapter of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import RunFolderError

from .layout import RunFolder


@dataclass(frozen=True)
class _ExportSource:
    source: str


def read_source(run: RunFolder) -> Path | None:
    """Return what the run folder exports; None when it trains an adapter of its own.

    Raises:
        RunFolderError: the file that names it is damaged.
    """
    if not run.source.is_file():
        return None
    recorded = typed_storage.read_or_none(_ExportSource, run.source)
    if recorded is None:
        raise RunFolderError(f"{run.source}: this file is damaged", "Run the same `kolotune export` again.")
    return Path(recorded.source)


def write_source(run: RunFolder, source: Path | None) -> None:
    """Record what the run folder exports; None when it trains an adapter of its own."""
    if source is None:
        run.source.unlink(missing_ok=True)
    else:
        typed_storage.write(run.source, _ExportSource(str(source)))
