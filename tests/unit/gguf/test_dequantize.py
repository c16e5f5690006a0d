"""A model folder of a quantized GGUF: its weights are those that others read, and the blocks stand for the same."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.tiny import tiny_llama, tiny_model

from kolotune.engines.native.ggml_blocks import dequantize as values_of
from kolotune.foundation import files
from kolotune.foundation.errors import ArtifactError, ModelError, SpaceError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import convert
from kolotune.gguf.dequantize import dequantize
from kolotune.gguf.quantize import quantize_file
from kolotune.weights import stored_blocks
from kolotune.weights.model_shape import read_shape
from kolotune.weights.torch_tensors import TensorFiles

_SIZES = {"intermediate_size": 256}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> Iterator[Path]:
    """A base of which some rows are whole super-blocks, its Q4_K_M, and the folder that was made of that."""
    folder = tmp_path_factory.mktemp("made")
    tiny_model(folder / "base", reporter)
    tiny_llama(0, **_SIZES).to(torch.bfloat16).save_pretrained(folder / "base")
    convert.convert_folder(folder / "base", folder / "whole.gguf", folder / "log", reporter)
    quantize_file(folder / "whole.gguf", folder / "quantized.gguf", "Q4_K_M", folder / "log", reporter)
    (folder / "out").mkdir()
    dequantize(folder / "quantized.gguf", folder / "base", folder / "out", folder / "log", reporter)
    yield folder
    shutil.rmtree(folder)


def test_weights_are_those_that_transformers_reads_from_the_gguf(made: Path) -> None:
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    expected = auto.from_pretrained(made, gguf_file="quantized.gguf", dtype=torch.float32).state_dict()
    found = auto.from_pretrained(made / "out", dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_blocks_have_the_same_values_in_the_same_order(made: Path) -> None:
    whole, blocks = TensorFiles([made / "out/model.safetensors"]), TensorFiles([made / "out" / stored_blocks.FILE])
    matrices = stored_blocks.read_matrices(made / "out")
    assert {matrix.type for matrix in matrices} == {"Q4_K", "Q6_K", "Q5_0", "Q8_0"} and len(matrices) == 14
    for matrix in matrices:
        assert torch.equal(values_of(blocks.read(matrix.entry.name), matrix.type), whole.read(matrix.name))
    shape = read_shape(made / "out")
    assert shape.blocks.keys() == {linear.name for linear in shape.linears}
    assert 0 < (made / "out" / stored_blocks.FILE).stat().st_size - sum(shape.blocks.values()) < 4000


def test_another_models_gguf_is_refused(made: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    other = tmp_path / "other"
    shutil.copytree(made / "base", other)
    tiny_llama(1, **_SIZES).to(torch.bfloat16).save_pretrained(other)
    with pytest.raises(ArtifactError, match="has other values than the model's"):
        dequantize(made / "quantized.gguf", other, _new(tmp_path / "a"), tmp_path / "log", reporter)


@pytest.mark.parametrize(("name", "reason"), [("output_norm", "where the model has"), ("other", "has no tensor")])
def test_a_gguf_with_other_tensors_is_refused(
    name: str, reason: str, made: Path, tmp_path: Path, reporter: PlainReporter
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor(f"{name}.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArtifactError, match=reason):
        dequantize(tmp_path / "m.gguf", made / "base", _new(tmp_path / "out"), tmp_path / "log", reporter)


def test_experts_are_refused(made: Path, tiny_model: Any, tmp_path: Path, reporter: PlainReporter) -> None:
    tiny_model("mixtral", tmp_path / "base")
    with pytest.raises(ModelError, match="experts"):
        dequantize(made / "quantized.gguf", tmp_path / "base", _new(tmp_path / "out"), tmp_path / "log", reporter)


def test_damaged_blocks_are_found(made: Path, tmp_path: Path) -> None:
    content = (made / "out" / stored_blocks.FILE).read_bytes()
    (tmp_path / stored_blocks.FILE).write_bytes(content[:-1])
    with pytest.raises(ModelError, match="is not whole"):
        stored_blocks.read_matrices(tmp_path)


def test_a_full_disk_is_seen_before_anything_is_written(
    made: Path, tmp_path: Path, reporter: PlainReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum((made / "out" / name).stat().st_size for name in ("model.safetensors", stored_blocks.FILE))
    monkeypatch.setattr(files, "free_space", lambda _: int(0.97 * needed))
    with pytest.raises(SpaceError, match="are needed there, but only"):
        dequantize(made / "quantized.gguf", made / "base", _new(tmp_path / "out"), tmp_path / "log", reporter)
    assert not any((tmp_path / "out").iterdir())


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder
