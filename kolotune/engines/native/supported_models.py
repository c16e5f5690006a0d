"""The models that the decoder can compute, by their ``config.json``; PyTorch is not needed to find out."""

from __future__ import annotations

import os
from pathlib import Path

from kolotune.weights.model_config import ModelConfig, RotaryEmbedding, read_model_config

from .architecture import Activation, read_architecture
from .families import FAMILIES, Family
from .rotary_settings import FULL, LONG, SCALINGS, SLIDING

_SWITCH = "KOLOTUNE_PACKED_STEP"
# In training, transformers drops some of the model's own numbers.
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "residual_dropout", "router_jitter_noise")


def reason_unsupported(folder: Path, longest: int) -> str:
    """Return why the decoder can't compute a model; "" when it can.

    Args:
        folder: of the model.
        longest: tokens of the longest chat.
    """
    if os.environ.get(_SWITCH) == "off":
        return f"{_SWITCH} is off"
    config = read_model_config(folder)
    if config.model_type not in FAMILIES:
        return f"its architecture is {config.model_type}"
    architecture = read_architecture(config)
    if architecture.activation not in list(Activation):
        return f"its activation is {architecture.activation}"
    for pattern in architecture.patterns:
        if pattern.rotary is not None and (reason := _reason_of_rotary(pattern.rotary, longest)):
            return reason
    family = architecture.family
    if architecture.rotated_share != 1.0 and "partial_rotary_factor" not in family.settings:
        return "its rotary embedding covers only a part of each head"
    return _reason_of_layers(config, family) or _reason_of_settings(config)


def _reason_of_rotary(rotary: RotaryEmbedding, longest: int) -> str:
    if rotary.kind not in SCALINGS or rotary.values.get("mscale") or rotary.values.get("truncate") is False:
        return f"its rotary embedding is {rotary.kind}"
    if rotary.kind == LONG and longest > rotary.number("original_max_position_embeddings"):
        return "its rotary embedding is stretched for the longest chat"
    return ""


def _reason_of_layers(config: ModelConfig, family: Family) -> str:
    unknown = sorted(set(config.layer_types) - {FULL, SLIDING})
    if unknown:
        return f"some of its layers have {unknown[0]}"
    if SLIDING in config.layer_types and not family.lists_layers:
        return "some of its layers have sliding window attention"
    return ""


def _reason_of_settings(config: ModelConfig) -> str:
    if any(config.text.get(name) for name in _DROPOUTS):
        return "it has dropout of its own"
    return "its attention sees later tokens" if config.text.get("use_bidirectional_attention") else ""
