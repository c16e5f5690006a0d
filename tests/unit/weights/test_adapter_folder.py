"""A folder without an adapter: the error names what to give instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from kolotune.weights.adapter_folder import newest_checkpoint, no_adapter


def make(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("files", "newest"),
    [
        (["checkpoint-500/adapter_config.json", "checkpoint-1000/adapter_config.json"], "checkpoint-1000"),
        (["checkpoint-9/adapter_config.json", "checkpoint-10/adapter_config.json"], "checkpoint-10"),
        (["checkpoint-500/adapter_config.json", "checkpoint-1000/optimizer.pt"], "checkpoint-500"),
        (["checkpoint-2/config.json"], "checkpoint-2"),
        (["checkpoint_7/adapter_config.json", "checkpoint-6/adapter_config.json"], "checkpoint_7"),
        (["checkpoint-best/adapter_config.json"], None),
        (["notes.txt"], None),
    ],
)
def test_the_newest_checkpoint(files: list[str], newest: str | None, tmp_path: Path) -> None:
    checkpoint = newest_checkpoint(make(tmp_path, *files))
    assert checkpoint == (None if newest is None else tmp_path / newest)
    if newest is not None:
        assert no_adapter(tmp_path).hint.endswith(str(tmp_path / newest))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter/adapter_config.json", "Did you mean"),
        ("final_model/adapter_config.json", "Did you mean"),
        ("merged_model/config.json", "Did you mean"),
        ("adapter_model.safetensors", "Copy adapter_config.json"),
        ("adapters.npz", "mlx"),
        ("pytorch_adapter.bin", "library adapters"),
        ("pytorch_lora_weights.safetensors", "diffusers"),
        ("lora.gguf", "GGUFs can't be merged"),
        ("readme.txt", "PEFT's format"),
    ],
)
def test_what_to_give_instead(file: str, words: str, tmp_path: Path) -> None:
    error = no_adapter(make(tmp_path, file))
    assert "holds no adapter" in error.cause and words in f"{error.cause} {error.hint}"


def test_no_folder(tmp_path: Path) -> None:
    assert "holds no adapter" in no_adapter(tmp_path / "none").cause
