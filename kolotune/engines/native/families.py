"""Which models the decoder computes, by their configs. PyTorch need not be loaded to know it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What a config may hold without changing what is computed; a key that stands nowhere here is one we don't know.
_KNOWN_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def why_not(folder: Path, longest: int) -> str:
    """Why the decoder can't compute a model; "" when it can.

    Args:
        folder: of the model.
        longest: tokens of the longest chat.
    """
    config = config_of(folder)
    kind = config.get("model_type")
    if kind not in _KNOWN_TYPES:
        return f"its architecture is {kind}"
    if config.get("hidden_act", "silu") != "silu":
        return f"its activation is {config['hidden_act']}"
    if rotary_of(config).get("rope_type", "default") not in ("default", "llama3", "linear"):
        return f"its rotary embedding is {rotary_of(config)['rope_type']}"
    if config.get("partial_rotary_factor", 1.0) != 1.0 or config.get("pretraining_tp", 1) != 1:
        return "it turns a part of each head only"
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        return "some of its layers see a window only"
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", kind == "mistral") and window < longest:
        return f"its layers see a window of {window} tokens"
    return ""


def config_of(folder: Path) -> dict[str, Any]:
    """The model's config.json."""
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return loaded


def rotary_of(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding's settings; older configs keep them in two places, and call the type by another name."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if "rope_type" not in found and "type" in found:
        found["rope_type"] = found["type"]
    return found
