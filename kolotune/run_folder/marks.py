"""Marks of stages that are running, failed or were interrupted: one file each, gone when the stage is done."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.files import remove

from .layout import RunFolder
from .records import now


class MarkState(StrEnum):
    """How far an unfinished stage came; the values are on disk."""

    RUNNING = "running"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Mark:
    """A stage that was started and is not done.

    Attributes:
        state: how far it came. A killed process leaves `RUNNING` behind; only the lock knows better.
        cause: the message of the error that ended it.
        time: when the mark was written, as `records.now` gives it.
    """

    state: MarkState
    cause: str = ""
    time: str = ""


def write_mark(run: RunFolder, stage: str, state: MarkState, cause: str = "") -> None:
    """Mark a stage as running, failed or interrupted."""
    typed_storage.write(_file_of(run, stage), Mark(state, cause, now()))


def remove_mark(run: RunFolder, stage: str) -> None:
    """Remove the mark of a stage that is done."""
    remove(_file_of(run, stage))


def read_mark(run: RunFolder, stage: str) -> Mark | None:
    """Read the mark of a stage; None when the stage is done, was never started, or the file is damaged."""
    return typed_storage.read_or_none(Mark, _file_of(run, stage))


def _file_of(run: RunFolder, stage: str) -> Path:
    return run.state / f"{stage}.unfinished.json"
