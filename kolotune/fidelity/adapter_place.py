"""Where a GGUF has a parameter of the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GgufPlace:
    """Where a parameter of the model lies in its GGUF.

    Attributes:
        tensor: its name there.
        order: row i of the GGUF is row ``order[i]`` of the parameter; None: the same order.
    """

    tensor: str
    order: tuple[int, ...] | None = None
