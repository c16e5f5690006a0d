"""Which models the decoder computes, by their configs. PyTorch need not be loaded to know it."""

from __future__ import annotations

from pathlib import Path

from kolotune.weights.model_config import read_model_config

# What a config may hold without changing what is computed; a key that stands nowhere here is one we don't know.
_KNOWN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def why_not(folder: Path, longest: int) -> str:
    """Why the decoder can't compute a model; "" when it can.

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
        return "it turns a part of each head only"
    if any(layer != "full_attention" for layer in config.layer_types):
        return "some of its layers see a window only"
    window = config.integer("sliding_window")
    if window is not None and values.get("use_sliding_window", kind == "mistral") and window < longest:
        return f"its layers see a window of {window} tokens"
    return ""
