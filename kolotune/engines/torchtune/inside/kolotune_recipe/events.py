"""What the driver is told, and the metric logger that tells it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any


class NotFiniteError(Exception):
    """A gradient or the loss is no number."""


def emit(event: str, **fields: Any) -> None:
    """Prints an event as a line of JSON."""
    print(json.dumps({"event": event, **fields}), flush=True)


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
