"""The models that the decoder can compute, by their ``config.json``; PyTorch is not needed to find out."""

from __future__ import annotations

from pathlib import Path

from kolotune.weights.model_config import read_model_config

_KNOWN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def reason_unsupported(folder: Path, longest: int) -> str:
    """Return why the decoder can't compute a model; "" when it can.

    Args:
        folder: of the model.
        longest: tokens of the longest chat.
    """
    config = read_model_config(folder)
    values, kind, rotary = config.values, config.model_type, config.rotary.kind
    if kind not in _KNOWN_TYPES:
        return f"its architecture is {kind}"
    if values.get("hidden_act", "silu") != "silu":
        return f"its activation is {values['hidden_act']}"
    if rotary not in ("default", "llama3", "linear"):
        return f"its rotary embedding is {rotary}"
    if values.get("partial_rotary_factor", 1.0) != 1.0 or values.get("pretraining_tp", 1) != 1:
        return "its rotary embedding covers only a part of each head"
    if any(layer != "full_attention" for layer in config.layer_types):
        return "some of its layers have sliding window attention"
    window = config.integer("sliding_window")
    if window is not None and values.get("use_sliding_window", kind == "mistral") and window < longest:
        return f"its layers have a sliding window of {window} tokens"
    return ""
