"""MLflow: the server or folder that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .tracker import TrackedRun

_LONGEST = 500  # characters of a parameter


class MlflowTracker:
    """A run in MLflow, which gives it its id."""

    def start(self, run: TrackedRun) -> str:
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # it may have a password
        import mlflow

        self._client: Any = mlflow
        mlflow.set_experiment(run.project)
        if run.is_resumed:
            mlflow.start_run(run_id=run.id)
        else:
            mlflow.start_run(run_name=run.name)
            mlflow.log_params({name: str(value)[:_LONGEST] for name, value in run.parameters.items()})
        return str(mlflow.active_run().info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._client.log_metrics(dict(values), step=step)

    def finish(self) -> None:
        self._client.end_run()
