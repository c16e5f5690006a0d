"""Events for the driver, the metrics file, and the metric logger through which torchtune reports its steps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class NotFiniteError(Exception):
    """A gradient or the loss is not finite."""


class DisagreementError(Exception):
    """The machines that train together were started with different settings."""


def emit(event: str, **fields: object) -> None:
    """Print an event as a line of JSON, in one write: several processes may share the pipe."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


class MetricsFile:
    """The metrics file. It is written here, not by the driver, so that no checkpoint is ever ahead of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **fields: float) -> None:
        """Append a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**fields, "time": round(time.time(), 3)}) + "\n")

    def truncate(self, step: int) -> None:
        """Start the file, with the lines up to a step: later steps are repeated."""
        exists = step > 0 and self._path.is_file()
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if exists else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self._path)


class MetricLogger:
    """torchtune's metric logger: passes the loss of each step to `on_step`, which the recipe sets."""

    def __init__(self) -> None:
        self.on_step: Callable[[float], None] = lambda loss: None

    def log(self, name: str, data: float, step: int) -> None:
        """Ignore single values: the recipe logs whole steps."""

    def log_config(self, config: object) -> None:
        """Ignore the config: the driver has it."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Report a step; `payload` holds its loss."""
        self.on_step(float(payload["loss"]))

    def close(self) -> None:
        """Nothing is open."""
