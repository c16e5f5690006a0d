"""Converting: BOS as it was trained, whatever the tokenizer's post-processor does; types; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kolotune import llamacpp
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.reporter import PlainReporter
from kolotune.gguf import header
from kolotune.gguf.convert import convert_folder

NEVER: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def _change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.fixture
def model(tiny_base: Path, toolchain: llamacpp.Toolchain, tmp_path: Path) -> Path:
    shutil.copytree(tiny_base, tmp_path / "model")
    return tmp_path / "model"


def test_bos_is_what_the_config_says(model: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    _change(model / "tokenizer.json", post_processor=NEVER)
    _change(model / "tokenizer_config.json", add_bos_token=True)
    convert_folder(model, tmp_path / "out.gguf", tmp_path / "log", reporter)
    summary = header.read(tmp_path / "out.gguf")
    assert summary.fields["tokenizer.ggml.add_bos_token"] is True
    assert {tensor.type for tensor in summary.tensors.values()} == {"BF16", "F32"}, "the type of the weights"


def test_one_wider_weight_makes_all_f32_and_is_reported(
    model: Path, tmp_path: Path, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float() * 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    assert convert_folder(model, tmp_path / "out.gguf", tmp_path / "log", reporter)["type"] == "f32"
    assert "f32" in capsys.readouterr().out


def test_an_unknown_architecture_leaves_nothing(model: Path, tmp_path: Path, reporter: PlainReporter) -> None:
    _change(model / "config.json", architectures=["NoSuchForCausalLM"])
    with pytest.raises(ToolchainError, match="NoSuchForCausalLM"):
        convert_folder(model, tmp_path / "out.gguf", tmp_path / "log", reporter)
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))
