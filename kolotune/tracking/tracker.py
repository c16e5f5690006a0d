"""What a tracker is: the protocol that each client follows here, and the table of them.

Clients are imported in a child process only (`follower`), which
a slow network or a failing server can hold up without holding up the training.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kolotune.foundation.errors import ConfigError
from kolotune.foundation.installation import install_command
from kolotune.foundation.typed_storage import JsonObject


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Attributes:
        project, name: what users see.
        id: the tracker's own name for it; a resumed training has the same.
        is_resumed: whether the tracker has it already.
        folder: where a tracker may keep files.
        parameters: the options of the run, none of them a secret.
    """

    project: str
    name: str
    id: str
    is_resumed: bool
    folder: Path
    parameters: JsonObject


class Tracker(Protocol):
    """A client of a tracker, for one run."""

    def start(self, run: TrackedRun) -> str:
        """Open the run, or open it again; return its id from now on."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""

    def finish(self) -> None:
        """Close the run, when everything is sent."""


@dataclass(frozen=True)
class TrackerEntry:
    """A tracker: the module of this package and its class, and the package of its client."""

    module: str
    class_name: str
    package: str


TRACKERS = {
    "trackio": TrackerEntry("trackio_client", "TrackioTracker", "trackio"),
    "wandb": TrackerEntry("wandb_client", "WandbTracker", "wandb"),
    "mlflow": TrackerEntry("mlflow_client", "MlflowTracker", "mlflow"),
    "tensorboard": TrackerEntry("tensorboard_client", "TensorboardTracker", "tensorboard"),
}


def require_installed(name: str) -> None:
    """Check that a tracker's client is installed, without importing it.

    Raises:
        ConfigError: it is not.
    """
    package = TRACKERS[name].package
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"track {name}: the package {package} is not installed",
            f"To install it, {install_command(name)}. Or omit --track.",
        )


def make_tracker(name: str) -> Tracker:
    """Return a tracker's client, which imports its package."""
    entry = TRACKERS[name]
    tracker: Tracker = getattr(importlib.import_module(f"{__package__}.{entry.module}"), entry.class_name)()
    return tracker
