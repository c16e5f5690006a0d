"""The shape of a model, from its config and headers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "mixtral"])
def test_weights_that_are_stored_in_bf16_are_counted(kind: str, tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    """Experts are among them; what is not is embedding, head and norms."""
    model = tiny_model(kind, tmp_path / "base", dtype="bfloat16")
    in_layers = {name: each for name, each in model.named_parameters() if ".layers." in name and each.dim() > 1}
    assert read_shape(tmp_path / "base").bf16_weight_count == sum(each.numel() for each in in_layers.values())
    tiny_model(kind, tmp_path / "wide", dtype="float32")
    assert not read_shape(tmp_path / "wide").bf16_weight_count
