"""What the driver is told, the metrics file, and the metric logger that torchtune tells of its steps."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class NotFiniteError(Exception):
    """A gradient or the loss is no number."""


class DisagreementError(Exception):
    """The machines that train together were asked for different things."""


def emit(event: str, **fields: Any) -> None:
    """Prints an event as a line of JSON; in one piece, for several processes may write to the same pipe."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


class Metrics:
    """The metrics file. Written here and not by the driver: a checkpoint must never be ahead of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, **fields: Any) -> None:
        """Adds a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**fields, "time": round(time.time(), 3)}) + "\n")

    def cut(self, step: int) -> None:
        """Begins the file; keeps what is there up to a step: those behind it are made again."""
        there = step > 0 and self._path.is_file()
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True) if there else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self._path)


class MetricLogger:
    """torchtune's metric logger: hands every step to `on_step`, which the recipe puts here."""

    def __init__(self) -> None:
        self.on_step: Callable[[float], None] = lambda loss: None

    def log(self, name: str, data: float, step: int) -> None:
        """Single values are of no interest: the recipe logs whole steps."""

    def log_config(self, config: Any) -> None:
        """The driver has the config."""

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        """One step is done; `payload` holds its loss."""
        self.on_step(float(payload["loss"]))

    def close(self) -> None:
        """Nothing is open."""
