"""The base model of an adapter made elsewhere: quantized copies, paths of other machines, and no name at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kolotune.base_models.adapter_base import base_of, naming_the_option, unquantized_name
from kolotune.foundation.errors import ConfigError, ModelError, ModelNotFoundError


def adapter(folder: Path, base: object, **config: Any) -> Path:
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": base, **config}
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    pair = {f"base_model.model.a.lora_{part}.weight": np.ones((1, 1), np.float32) for part in "AB"}
    save_file(pair, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "guess"),
    [
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "unsloth/Qwen2.5-7B-Instruct"),
        ("unsloth/gemma-3-4b-it-unsloth-bnb-4bit", "unsloth/gemma-3-4b-it"),
        ("unsloth/llama-3-8b-bnb-4bit", "unsloth/llama-3-8b"),
        ("mlx-community/Llama-3.2-3B-Instruct-4bit", "meta-llama/Llama-3.2-3B-Instruct"),
        ("mlx-community/Qwen3-4B-8bit-DWQ", "Qwen/Qwen3-4B"),
        ("TheBloke/Mistral-7B-Instruct-v0.2-AWQ", "mistralai/Mistral-7B-Instruct-v0.2"),
        ("TheBloke/zephyr-7B-beta-GPTQ", ""),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8", "neuralmagic/Meta-Llama-3.1-8B-Instruct"),
        ("/kaggle/input/llama-3.1/transformers/8b-instruct/1", "meta-llama/llama-3.1-8b-instruct"),
        ("/kaggle/input/models/qwen-lm/qwen2.5/transformers/7b-instruct/1", "Qwen/qwen2.5-7b-instruct"),
        ("/kaggle/working/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/content/drive/MyDrive/gemma-2-2b-it", "google/gemma-2-2b-it"),
        ("/root/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abc", "Qwen/Qwen3-8B"),
        ("/root/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("C:\\Users\\me\\models\\Phi-3.5-mini-instruct", "microsoft/Phi-3.5-mini-instruct"),
        ("./out/checkpoint-500", ""),
        ("/workspace/my-model", ""),
        ("", ""),
    ],
)
def test_the_guess_of_an_unquantized_model(name: str, guess: str) -> None:
    assert unquantized_name(name) == guess


@pytest.mark.parametrize(
    "name", ["unsloth/Qwen2.5-7B-bnb-4bit", "mlx-community/Qwen3-4B-4bit", "a/b-AWQ", "a/b-gptq-int4"]
)
@pytest.mark.parametrize("is_given", [True, False])
def test_a_quantized_copy_is_refused_before_it_is_downloaded(name: str, is_given: bool, tmp_path: Path) -> None:
    folder = adapter(tmp_path, "Qwen/Qwen3-4B" if is_given else name)
    with pytest.raises(ConfigError, match="is a quantized copy") as caught:
        base_of(folder, name if is_given else None)
    assert "--base" in caught.value.hint and unquantized_name(name) in caught.value.hint


@pytest.mark.parametrize(
    "name", ["/kaggle/input/llama-3.1/transformers/8b/1", "/content/model", "./outputs", "D:\\models\\Qwen3-4B"]
)
def test_a_path_of_another_machine(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist on this machine") as caught:
        base_of(adapter(tmp_path, name), None)
    assert "--base" in caught.value.hint


@pytest.mark.parametrize("name", ["", None])
def test_no_name(name: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not name a base model") as caught:
        base_of(adapter(tmp_path, name), None)
    assert "--base" in caught.value.hint


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-7B-Instruct", "smollm2-135m", "google/gemma-2-2b-it", "a/model-8b"])
def test_other_names_are_taken(name: str, tmp_path: Path) -> None:
    assert base_of(adapter(tmp_path, name), None) == name
    assert base_of(adapter(tmp_path, "/kaggle/x"), name) == name


def test_a_quantized_folder(tmp_path: Path, tiny_model: Callable[..., Any]) -> None:
    base = tmp_path / "Qwen3-4B-bnb-4bit"
    tiny_model("llama", base)
    assert base_of(adapter(tmp_path, str(base)), None) == str(base)  # the name alone says nothing about a folder
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="is quantized") as caught:
        base_of(adapter(tmp_path, str(base)), None)
    assert "--base Qwen/Qwen3-4B" in caught.value.hint


def test_an_adapter_that_cant_be_merged_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="VeRA"):
        base_of(adapter(tmp_path, "a/b-4bit", peft_type="VERA"), "a/b-4bit")


def test_a_model_that_is_gone_from_the_hub(tmp_path: Path) -> None:
    folder = adapter(tmp_path, "owner/gone")
    with (
        pytest.raises(ModelNotFoundError, match="names can't be found: gone") as caught,
        naming_the_option(folder, None),
    ):
        raise ModelNotFoundError("gone")
    assert "--base" in caught.value.hint
    with pytest.raises(ModelNotFoundError, match=r"^gone$"), naming_the_option(folder, "owner/other"):
        raise ModelNotFoundError("gone")
