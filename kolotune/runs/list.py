"""`kolotune runs`: the runs below a folder, as their records describe them; nothing is hashed."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from kolotune.foundation import config as configs
from kolotune.foundation.errors import KolotuneError, RunFolderError
from kolotune.pipeline.lock import is_locked
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.marks import Mark, MarkState, read_mark
from kolotune.run_folder.records import Record, read_record
from kolotune.stages import modelfile, train

_DEPTH = 5


class RunState(StrEnum):
    """How far a run came, as its records say."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    PARTLY_DONE = "done up to"
    NOT_STARTED = "not begun"


@dataclass(frozen=True)
class ListedRun:
    """A run below a folder.

    Attributes:
        folder: the run folder.
        base: name of the base model; "" when it is not known.
        state: how far the run came.
        stage: the stage that is running, failed or was interrupted, or the last one that is done; "" otherwise.
        size: bytes.
        age: seconds since a stage started, ended or failed.
        held_out_loss: after the training, in nats; None without held-out chats or training.
    """

    folder: RunFolder
    base: str
    state: RunState
    stage: str
    size: int
    age: float
    held_out_loss: float | None

    @property
    def state_text(self) -> str:
        """The state as `kolotune runs` shows it."""
        if not self.stage:
            return self.state
        return f"{self.state}{' ' if self.state is RunState.PARTLY_DONE else ': '}{self.stage}"


def runs_below(folder: Path) -> Iterator[ListedRun]:
    """Find the run folders in `folder` and a few levels below it, in the order of their names; links are not followed.

    Raises:
        RunFolderError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunFolderError(f"{folder}: there is no such folder", "Name one that contains run folders.")
    for path, subfolders, _ in os.walk(folder):
        run = RunFolder(Path(path))
        if run.state.is_dir():
            yield _read_run(run)
            subfolders.clear()
        is_deep = len(run.root.relative_to(folder).parts) >= _DEPTH
        subfolders[:] = [] if is_deep else sorted(name for name in subfolders if not name.startswith("."))


def folder_size(folder: Path) -> int:
    """Return the bytes below a folder; files may vanish meanwhile."""
    size = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(path, name)).st_size
    return size


def _read_run(run: RunFolder) -> ListedRun:
    records = {name: record for name in STAGE_NAMES if (record := read_record(run, name)) is not None}
    marks = {name: mark for name in STAGE_NAMES if (mark := read_mark(run, name)) is not None}
    state, stage = _state_of(run, records, marks)
    loss = records[train.NAME].facts.get("held_out_loss") if train.NAME in records else None
    return ListedRun(
        folder=run,
        base=_base_of(run),
        state=state,
        stage=stage,
        size=folder_size(run.root),
        age=max(0.0, datetime.datetime.now().timestamp() - _last_change(run, records, marks)),
        held_out_loss=loss if isinstance(loss, (int, float)) else None,
    )


def _base_of(run: RunFolder) -> str:
    base = ""
    if run.config.is_file():
        with contextlib.suppress(KolotuneError):  # a damaged config: the rest is shown all the same
            base = str(configs.load_file(run.config).get("base_model", ""))
    return Path(base).name if Path(base).is_absolute() else base


def _state_of(run: RunFolder, records: dict[str, Record], marks: dict[str, Mark]) -> tuple[RunState, str]:
    is_running = is_locked(run)
    for name, mark in marks.items():
        if mark.state is MarkState.RUNNING and not is_running:
            return RunState.INTERRUPTED, name
        return RunState(mark.state.value), name
    if is_running:
        return RunState.RUNNING, ""
    if not records:
        return RunState.NOT_STARTED, ""
    # What comes after the Modelfiles only examines the result.
    return (RunState.DONE, "") if modelfile.NAME in records else (RunState.PARTLY_DONE, list(records)[-1])


def _last_change(run: RunFolder, records: dict[str, Record], marks: dict[str, Mark]) -> float:
    """Return when a stage last started, ended or failed, in seconds since 1970; a copy changes the times of files."""
    times = [record.finished for record in records.values()] + [mark.time for mark in marks.values() if mark.time]
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(max(times)).timestamp()
    return run.state.stat().st_mtime
