"""Bases on a quantization grid are recognised, with the types that erase a training; ordinary ones are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kolotune.gguf import base_grid


def saved(folder: Path, weights: np.ndarray) -> Path:
    """Save a model of two layers; the values are those of bf16, which packaged bases have."""
    folder.mkdir()
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    rounded = ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)
    tensors = {f"model.layers.{layer}.mlp.down_proj.weight": rounded + np.float32(0) for layer in range(2)}
    save_file({**tensors, "model.norm.weight": np.ones(512, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("grid", "erasing"),
    [("", ""), ("Q4_0", "Q4_0"), ("Q4_1", "Q4_1 Q4_K"), ("Q4_K", "Q4_K"), ("Q5_K", "Q5_K"), ("Q8_0", "")],
)
def test_a_grid_is_recognised_by_what_it_erases(grid: str, erasing: str, tmp_path: Path) -> None:
    weights = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32) * 0.05
    if grid:
        weights = base_grid._rounded(weights, grid)
    found = base_grid.find_grid(saved(tmp_path / "base", weights), tmp_path / "log")
    if not erasing:
        assert found is None
        return
    assert found is not None
    assert set(erasing.split()) <= set(found.erasing) and "Q8_0" in found.keeping
    assert not set(found.erasing) & set(found.keeping)


def test_a_model_without_matrices_lies_on_no_grid(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.ones(64, np.float32)}, tmp_path / "model.safetensors")
    assert base_grid.find_grid(tmp_path, tmp_path / "log") is None
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert base_grid.find_grid(tmp_path, tmp_path / "log") is None
