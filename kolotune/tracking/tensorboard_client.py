"""TensorBoard: event files in the run folder, for ``tensorboard --logdir``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .tracker import TrackedRun


class TensorboardTracker:
    """Event files of a run; a resumed training adds another file, which TensorBoard joins with the first."""

    def start(self, run: TrackedRun) -> str:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = Event
        self._writer: Any = EventFileWriter(str(run.folder / "tensorboard" / run.id))
        if not run.is_resumed:
            parameters = {name: _plain(value) for name, value in run.parameters.items()}
            self._writer.add_event(Event(wall_time=time.time(), summary=hparams_pb(parameters, trial_id=run.id)))
        return run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))

    def finish(self) -> None:
        self._writer.close()


def _plain(value: object) -> bool | float | str:
    return value if isinstance(value, (bool, int, float)) else str(value)
