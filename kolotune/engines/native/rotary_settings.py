"""How layers turn positions, as ``config.json`` says it: its layout changed with transformers' versions."""

from __future__ import annotations

from kolotune.foundation.typed_storage import JsonObject
from kolotune.weights.model_config import ModelConfig, RotaryEmbedding

from .families import Settings

SLIDING, FULL = "sliding_attention", "full_attention"
"""Kinds of layers: those that see a window, and those that see everything."""

LONG = "longrope"
SCALINGS = frozenset({"default", "linear", "llama3", "yarn", LONG})
"""Kinds of rotary embedding that `rotary_frequencies` computes."""

_OLD_NAMES = {("phi3", "su"): LONG, ("phi3", "yarn"): LONG}


def read_rotary(config: ModelConfig, settings: Settings, kind: str) -> RotaryEmbedding:
    """Return how layers of a kind turn positions.

    The file says it for each kind, or once. If layers with windows have a base of their own, only the other ones are
    scaled.

    Raises:
        ModelError: the base is not a number.
    """
    section = _section(config)
    of_kind = section.get(kind)
    if isinstance(of_kind, dict):
        section = of_kind
    elif kind == SLIDING and settings["rope_local_base_freq"] is not None:
        section = {"rope_theta": settings["rope_local_base_freq"]}
    elif SLIDING in section or FULL in section:
        section = {}
    theta = config.text.get("rope_theta", settings["rope_theta"])
    lengths = {
        "original_max_position_embeddings": config.max_positions,
        "max_position_embeddings": config.max_positions,
    }
    values = {"rope_theta": theta, **lengths, **section}
    original = config.text.get("original_max_position_embeddings", settings["original_max_position_embeddings"])
    if original is not None:
        values["original_max_position_embeddings"] = original
    return config.rotary_embedding(values, _OLD_NAMES.get((config.model_type, _kind(section)), _kind(section)))


def rotated_share(config: ModelConfig, settings: Settings) -> float:
    """Return the share of each head that is turned."""
    beside = config.text.get("partial_rotary_factor", settings["partial_rotary_factor"])
    found = _section(config).get("partial_rotary_factor", beside)
    return float(found) if isinstance(found, (int, float)) else 1.0


def _section(config: ModelConfig) -> JsonObject:
    for name in ("rope_parameters", "rope_scaling"):
        found = config.text.get(name)
        if isinstance(found, dict) and found:
            return found
    return {}


def _kind(section: JsonObject) -> str:
    return str(section.get("rope_type", section.get("type")) or "default")
