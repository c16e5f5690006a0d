"""What compensated quantization is expected to take is near what it took: figures of docs/quantization.md."""

from __future__ import annotations

import pytest

from kolotune.planning.duration import compensation_work
from kolotune.planning.memory import compensation_memory
from kolotune.weights.model_shape import Linear, ModelShape


def shape_of(hidden: int, mlp: int, keys: int, layers: int, vocabulary: int = 49152) -> ModelShape:
    sides = {
        "q": (hidden, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, hidden),
        "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp),
    }  # fmt: skip
    linears = tuple(Linear(f"{layer}.{name}", *both) for layer in range(layers) for name, both in sides.items())
    return ModelShape((), linears, layers, hidden, 1, 1, 1, vocabulary, tied=True)


def test_memory_is_near_what_was_seen() -> None:
    wide = compensation_memory(shape_of(768, 1536, 256, 30)).own
    assert wide == pytest.approx(1.25e9, rel=0.1)
    one_billion = compensation_memory(shape_of(2048, 8192, 512, 16, 128256)).own
    assert 2.4e9 < one_billion < 3e9


def test_time_is_near_what_was_seen() -> None:
    assert compensation_work(shape_of(576, 1536, 192, 30)) == pytest.approx(115, rel=0.2)
    assert compensation_work(shape_of(768, 1536, 256, 30)) == pytest.approx(170, rel=0.25)
