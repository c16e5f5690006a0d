"""Weights & Biases: what WANDB_MODE, WANDB_BASE_URL and the user's login say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tracker import TrackedRun


class WandbTracker:
    """A run in Weights & Biases."""

    def start(self, run: TrackedRun) -> str:
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True)
        self._run: Any = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=str(run.folder),
            config=run.parameters,
            settings=settings,
        )
        # An evaluation comes after its step; the steps of W&B may not repeat.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def finish(self) -> None:
        self._run.finish()
