"""What a base model's folder must contain to be fine-tuned."""

from __future__ import annotations

from pathlib import Path

from kolotune.foundation.errors import ModelError
from kolotune.weights.model_config import read_model_config
from kolotune.weights.weight_files import weight_files


def check_model_folder(folder: Path) -> Path:
    """Return the folder if it has a config, a tokenizer and whole safetensors files.

    Raises:
        ModelError: something is missing or damaged, or the weights are pickled or quantized.
    """
    config = read_model_config(folder)
    if not config.architectures:
        raise ModelError(f"{config.path}: names no architecture", "Give a folder in the Hugging Face format.")
    if config.is_quantized:
        raise ModelError(
            f"{folder}: its weights are quantized already",
            "Fine-tune the unquantized model; --load-in-4bit quantizes it for training.",
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        raise ModelError(f"{folder}: has no tokenizer (tokenizer.json)", "Copy the tokenizer's files into the folder.")
    weight_files(folder)
    return folder
