"""Tensors are mapped from files, and written to files that safetensors and transformers read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kolotune.foundation.errors import ArtifactError
from kolotune.weights.dtypes import as_f32, from_f32
from kolotune.weights.mapped_tensors import MappedTensors, row_blocks
from kolotune.weights.safetensors_header import Entry
from kolotune.weights.shards import split_into_shards, write_shards
from kolotune.weights.weight_files import weight_files

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
    """Write tensors that were mapped from a file of the safetensors package."""
    source = folder.parent / f"{folder.name}.source"
    save_file({name: each.contiguous() for name, each in tensors.items()}, source)
    mapped = MappedTensors([source])
    shards = split_into_shards([mapped.entries[name] for name in tensors], **more)
    write_shards(folder, shards, lambda entry: _blocks(mapped, entry))
    assert [(folder / shard.name).stat().st_size for shard in shards] == [shard.size for shard in shards]
    return [folder / shard.name for shard in shards]


def _blocks(mapped: MappedTensors, entry: Entry) -> Iterator[Any]:
    values = mapped[entry.name]
    return (values[rows] if values.ndim else values for rows in row_blocks(entry))


def _read(paths: list[Path]) -> dict[str, torch.Tensor]:
    return {name: each for path in paths for name, each in load_file(path).items()}


def _require_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype is tensor.dtype and torch.equal(actual[name], tensor), name


def test_one_file(tmp_path: Path) -> None:
    paths = _written(tmp_path, TENSORS)
    assert [path.name for path in paths] == ["model.safetensors"] == [path.name for path in tmp_path.iterdir()]
    _require_equal(load_file(paths[0]), TENSORS)
    with safe_open(paths[0], framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 30, 100, 200])
def test_several_files(tmp_path: Path, limit: int) -> None:
    paths = _written(tmp_path, TENSORS, shard_bytes=limit)
    count = len(paths)
    assert count > 1 and paths[0].name == f"model-00001-of-{count:05d}.safetensors"
    for path in paths:
        tensors = [tensor for tensor in load_file(path).values() if tensor.numel()]
        assert len(tensors) <= 1 or sum(tensor.nbytes for tensor in tensors) <= limit
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert weight_files(tmp_path) == paths
    _require_equal(_read(paths), TENSORS)


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ArtifactError, match="tensor x"):
        MappedTensors([tmp_path / "one", tmp_path / "two"])


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"x\.safetensors"):
        MappedTensors([path])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversions_agree_with_torch(dtype: torch.dtype) -> None:
    """All 16-bit patterns to fp32 and back, and random fp32 values with ties."""
    name = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}[dtype]
    if name != "F64":
        bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        finite = values.isfinite()
        raw = bits[finite].numpy().view("<u2" if name == "BF16" else "<f2")
        assert torch.equal(torch.from_numpy(as_f32(raw, name)), values[finite].float())
        assert (from_f32(as_f32(raw, name), name) == raw).all()
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(100_000, generator=generator) * torch.tensor([1e-7, 1.0, 3e4]).repeat(33_334)[:100_000]
    wide[::7] = wide[::7].view(torch.int32).bitwise_and(-4096).view(torch.float32)  # ties
    narrow = from_f32(wide.numpy(), name)
    narrow = narrow if name == "F64" else narrow.view("<i2")
    assert torch.equal(torch.from_numpy(narrow).view(dtype), wide.to(dtype))


def test_transformers_loads_a_sharded_model(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    import transformers

    model = tiny_model("llama", tmp_path)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    assert len(_written(tmp_path, state, shard_bytes=50_000)) > 3
    loaded, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    _require_equal(loaded.state_dict(), state)
