"""``python -m kolotune.tracking TASK``: log the metrics that arrive as lines on standard input, until it closes."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject

from .tracker import TrackedRun, Tracker, make_tracker

_NO_METRICS = ("step", "time")


@dataclass(frozen=True)
class TrackingTask:
    """A training to track.

    Attributes:
        tracker: its name in `TRACKERS`.
        project, name: see `TrackedRun`.
        folder: where a tracker may keep files.
        state: file of the `TrackingState`.
        resumes: whether the training resumes an earlier one.
        training: what a resumed training agrees in with the earlier one.
        parameters: the run's options, without secrets.
    """

    tracker: str
    project: str
    name: str
    folder: str
    state: str
    resumes: bool
    training: JsonObject
    parameters: JsonObject


@dataclass(frozen=True)
class TrackingState:
    """What was logged, so that a resumed training continues the same tracked run and logs nothing twice.

    Attributes:
        tracker, project: where.
        training: hash of what a resumed training agrees in.
        id: of the tracked run.
        step, is_evaluation: of the last line that was logged.
    """

    tracker: str
    project: str
    training: str
    id: str
    step: int = -1
    is_evaluation: bool = False


def track(task: TrackingTask, lines: Iterable[str], tracker: Tracker) -> None:
    """Log each line of a metrics file that was not logged before."""
    file = Path(task.state)
    training = hashlib.sha256(repr(sorted(task.training.items())).encode()).hexdigest()
    known = typed_storage.read_or_none(TrackingState, file) if task.resumes else None
    new = TrackingState(task.tracker, task.project, training, uuid.uuid4().hex[:8])
    is_resumed = known is not None and all(
        getattr(known, name) == getattr(new, name) for name in ("tracker", "project", "training")
    )
    state = known if is_resumed and known is not None else new
    run = TrackedRun(task.project, task.name, state.id, is_resumed, Path(task.folder), task.parameters)
    state = dataclasses.replace(state, id=tracker.start(run))
    for line in lines:
        state = _log(line, state, tracker, file)
    tracker.finish()


def _log(line: str, state: TrackingState, tracker: Tracker, file: Path) -> TrackingState:
    try:
        fields = typed_storage.parse_object(line)
    except typed_storage.StorageError:
        return state  # a crash in the middle of writing left it
    values = {name: float(value) for name, value in fields.items() if isinstance(value, (int, float))}
    step, is_evaluation = int(values.get("step", 0)), "held_out_loss" in values
    if (step, is_evaluation) <= (state.step, state.is_evaluation):
        return state
    tracker.log(step, {name: value for name, value in values.items() if name not in _NO_METRICS})
    state = dataclasses.replace(state, step=step, is_evaluation=is_evaluation)
    typed_storage.write(file, state)
    return state


def main(arguments: list[str]) -> int:
    """Carry out the task in the file `arguments[0]`; return the exit code."""
    task = typed_storage.read(TrackingTask, Path(arguments[0]))
    track(task, sys.stdin, make_tracker(task.tracker))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
