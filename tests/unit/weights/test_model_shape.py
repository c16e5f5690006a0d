"""The shape of a model, from its config and headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kolotune.weights.model_shape import read_shape


def test_a_shape_is_read_without_its_weights(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "base", dtype="bfloat16")
    shape = read_shape(tmp_path / "base")
    assert shape.weight_count == sum(each.numel() for each in model.parameters())
    assert shape.stored_bytes == 2 * shape.weight_count
    assert (shape.layers, shape.hidden_size, shape.attention_heads, shape.key_value_heads, shape.head_size) == (
        2,
        64,
        4,
        2,
        16,
    )
    assert not shape.tied
    assert len(shape.first_layer) == 7
