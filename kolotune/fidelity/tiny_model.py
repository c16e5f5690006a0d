"""A tiny model of an architecture with random weights, of a size at which every part of it changes the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import ModelError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.weights.model_config import FILE

_NOISE = 0.1  # standard deviation of what is added to norms, biases and the like
_SEED = 0


def write_tiny_model(config: JsonObject, folder: Path) -> Any:
    """Write a model folder with random weights in fp32 and without a tokenizer; return the model.

    Args:
        config: as `weights.shrunk_config.shrink` returns it; the folder gets it as it is.
        folder: a new folder.

    Raises:
        ModelError: transformers can't make a model of it.
    """
    import torch
    import transformers

    library: Any = transformers  # its factories are not typed
    folder.mkdir(parents=True)
    text = json.dumps(config, indent=1)
    (folder / FILE).write_text(text, encoding="utf-8")
    torch.manual_seed(_SEED)
    try:
        settings = library.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = library.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
        _randomize(model)
        model.save_pretrained(folder)
    except Exception as error:  # its hundred model classes raise whatever they like
        raise ModelError(f"transformers: {type(error).__name__}: {error}") from error
    (folder / FILE).write_text(text, encoding="utf-8")  # it was replaced by transformers' own names for the same
    return model


def _randomize(model: Any) -> None:
    """Give matrices outputs as large as their inputs, and move every vector away from zero and one."""
    import torch

    stored = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in stored.items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape)
            if tensor.dim() < 2 or "conv" in name or name.endswith("A_log"):
                tensor.add_(noise * _NOISE)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
