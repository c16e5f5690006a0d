"""Tensors are read one at a time and written to files that safetensors and transformers read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kolotune.errors import ArtifactError
from kolotune.weights import ShardWriter, tensors_in, weight_files

TENSORS = {
    "a": torch.randn(7, 5),
    "b.f16": torch.randn(3, 1).half(),
    "c.bf16": torch.randn(4).bfloat16(),
    "d.f64": torch.randn(2, 2, 2, dtype=torch.float64),
    "e.long": torch.arange(5),
    "f.int": torch.arange(5, dtype=torch.int32),
    "g.short": torch.arange(5, dtype=torch.int16),
    "h.bytes": torch.arange(5, dtype=torch.uint8),
    "i.signed": torch.arange(5, dtype=torch.int8),
    "j.flags": torch.tensor([True, False, True]),
    "k.scalar": torch.tensor(2.5),
    "l.empty": torch.zeros(0, 4),
    "m.transposed": torch.randn(3, 6).T,
    'n "quoted" ünïcode': torch.ones(1),
}


def _written(folder: Path, tensors: dict[str, torch.Tensor], **more: Any) -> list[Path]:
    writer = ShardWriter(folder, list(tensors), **more)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.close()


def _equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def test_one_file(tmp_path: Path) -> None:
    paths = _written(tmp_path, TENSORS)
    assert [path.name for path in paths] == ["model.safetensors"] == [path.name for path in tmp_path.iterdir()]
    _equal(load_file(paths[0]), TENSORS)
    _equal(dict(tensors_in(paths)), TENSORS)
    with safe_open(paths[0], framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 30, 100, 200])
def test_several_files(tmp_path: Path, limit: int) -> None:
    paths = _written(tmp_path, TENSORS, shard_bytes=limit)
    count = len(paths)
    assert count > 1 and paths[0].name == f"model-00001-of-{count:05d}.safetensors"
    for path in paths:
        held = [each for each in load_file(path).values() if each.numel()]
        assert len(held) <= 1 or sum(each.numel() * each.element_size() for each in held) <= limit
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(each.numel() * each.element_size() for each in TENSORS.values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert weight_files(tmp_path) == paths
    _equal(dict(tensors_in(paths)), TENSORS)
    assert not list(tmp_path.glob("*.partial"))


def test_a_name_in_two_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ArtifactError, match="x stands in two files"):
        list(tensors_in([tmp_path / "one", tmp_path / "two"]))


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_damaged_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        list(tensors_in([path]))


def test_transformers_loads_a_sharded_model(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    import transformers

    model = tiny_model("llama", tmp_path)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    assert len(_written(tmp_path, state, shard_bytes=50_000)) > 3
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    _equal(loaded.state_dict(), state)
