"""trackio: on this machine, or on the server that TRACKIO_SERVER_URL names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tracker import TrackedRun


class TrackioTracker:
    """A run in trackio, which knows runs by name: it is the run's name and the id."""

    def start(self, run: TrackedRun) -> str:
        import trackio

        self._client: Any = trackio
        trackio.init(
            project=run.project,
            name=f"{run.name}-{run.id}",
            config=run.parameters,
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        return run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._client.log(dict(values), step=step)

    def finish(self) -> None:
        self._client.finish()
