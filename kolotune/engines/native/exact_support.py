"""Which models `exact_decoder` computes; PyTorch is not needed to find out."""

from __future__ import annotations

from pathlib import Path

from kolotune.weights.model_config import read_model_config

from . import supported_models
from .architecture import read_architecture


def reason_unsupported(folder: Path, longest: int) -> str:
    """Return why a model is not computed; "" when it is. See `engines.exact_model`."""
    if reason := supported_models.reason_unsupported(folder, longest):
        return reason
    config = read_model_config(folder)
    if "quantization_config" in config.values:
        return "its weights are quantized"
    return "it has experts" if read_architecture(config).chosen_experts else ""
