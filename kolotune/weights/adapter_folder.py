"""What a folder without an adapter holds instead: checkpoints, an adapter one folder below, another tool's format."""

from __future__ import annotations

import re
from pathlib import Path

from kolotune.foundation.errors import ModelError

FILE = "adapter_config.json"
_CHECKPOINT = re.compile(r"checkpoint[-_](?:step[-_]?)?(\d+)")
_FORMATS = {
    "adapters.npz": "an adapter in mlx's older format",
    "pytorch_adapter.bin": "an adapter of the library adapters",
    "pytorch_lora_weights.safetensors": "an adapter of diffusers",
    "model_weights.ckpt": "an adapter of NeMo",
}


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter."""
    return (folder / FILE).is_file()


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the trainer's checkpoint with the highest step that holds an adapter or a model; None if there is none."""
    steps = {int(match[1]): path for path in _subfolders(folder) if (match := _CHECKPOINT.fullmatch(path.name))}
    return steps[max(steps)] if steps else None


def no_adapter(folder: Path) -> ModelError:
    """Return the error for a folder that holds neither an adapter nor a model; it names what to give instead."""
    cause = f"{folder}: holds no adapter (no {FILE})"
    newest = newest_checkpoint(folder)
    if newest is not None:
        return ModelError(f"{cause}, but checkpoints", f"Give the one that you want; the newest is {newest}")
    below = _subfolders(folder)
    if below:
        return ModelError(f"{cause}", f"Did you mean {' or '.join(map(str, below[:3]))}?")
    for name, description in _FORMATS.items():
        if (folder / name).is_file():
            return ModelError(f"{cause}: {name} is {description}", "Convert it to PEFT's format first.")
    if (folder / "adapter_model.safetensors").is_file():
        return ModelError(cause, f"Copy {FILE} from where the adapter was trained: it has the scale of the update.")
    if next(folder.glob("*.gguf"), None) is not None:
        return ModelError(
            f"{cause}; GGUFs can't be merged", "Give the adapter that it was made from, in PEFT's format."
        )
    return ModelError(cause, "Give a folder in PEFT's format.")


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    holds = [path for path in folder.iterdir() if is_adapter(path) or (path / "config.json").is_file()]
    return sorted(holds)
