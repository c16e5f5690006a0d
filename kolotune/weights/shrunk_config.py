"""Shrink a model's ``config.json``: the same architecture with the same rules and few weights.

Kept are the first layers, at least one of each kind, the width of attention heads, the rotary embedding, activations,
factors and switches. Widths shrink in proportion; heads, experts, tokens and windows become few. More layers would only
add up what both sides round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeGuard

from kolotune.foundation.typed_storage import JsonObject

VOCABULARY = 512
"""Tokens of a shrunk model."""
WINDOW = 24
"""Tokens that a layer with a sliding window, chunks or dynamic scaling sees in a shrunk model."""

_FEW_LAYERS = 2
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_STACKED = ("num_layers_per_stack",)  # of which HRM-Text's number of layers is a multiple
_PERIODS = ("attn_layer_period", "expert_layer_period", "sliding_window_pattern", "full_attention_interval")
_BY_NUMBER = "per_layer_config"
# Types whose layers depend on how many there are, here or in llama.cpp.
_ALL_LAYERS = frozenset({"dots3_note_text", "exaone4", "exaone_moe", "gemma3n_text"})
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_WIDTHS = frozenset(
    {
        "block_ff_dim",
        "dense_intermediate_size",
        "ffn_hidden_size",
        "index_n_heads",
        "intermediate_size",
        "intermediate_size_mlp",
        "kv_lora_rank",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "mamba_d_ssm",
        "mamba_dt_rank",
        "mamba_n_heads",
        "mamba_num_heads",
        "mlp_hidden_size",
        "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "n_inner",
        "num_heads",
        "o_lora_rank",
        "q_lora_rank",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "time_step_rank",
    }
)
_WINDOWS = frozenset(
    {
        "attention_chunk_size",
        "index_topk",
        "local_window",
        "sliding_window",
        "sliding_window_size",
        "window_size",
    }
)
_IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map"})
_MOST = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "top_k", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "n_groups", "mamba_n_groups"), 2),
    "topk_group": 1,
}
_SMALL_HIDDEN = 128
_MOST_WIDTH = 256
_STEP = 16  # kernels ask for widths of whole vectors


def reach(config: Mapping[str, object]) -> int | None:
    """Return the number of tokens up to which a window or the dynamic scaling of a model changes nothing, if any.

    In a shrunk model that is `WINDOW`.
    """
    lengths = [value for name, value in config.items() if name in _WINDOWS and _is_positive(value)]
    if _has_dynamic_scaling(config) and _is_integer(longest := config.get("max_position_embeddings")):
        lengths.append(longest)
    return min(lengths, default=None)


def shrink(config: Mapping[str, object]) -> JsonObject:
    """Return the config of a tiny model of the same architecture.

    Args:
        config: of a language model, as in its file; not of a composite model.
    """
    hidden, heads = _integer(config, _HIDDEN), _integer(config, _HEADS)
    factor = 1.0
    shrunk = _first_layers({name: value for name, value in config.items() if name not in _IRRELEVANT})
    if hidden and heads:
        few, own_size = _few_heads(config, heads), _integer(config, ("head_dim",))
        is_divided = hidden % heads == 0 and own_size in (None, hidden // heads)
        factor = few / heads if is_divided else _SMALL_HIDDEN / hidden
        keys = _integer(config, _KEY_HEADS)
        for name in _HEADS:
            _replace(shrunk, name, few)
        for name in _KEY_HEADS:
            _replace(shrunk, name, few if keys == heads else max(1, few // 2) if keys != 1 else 1)
    elif hidden:
        factor = _SMALL_HIDDEN / hidden
    for name in _HIDDEN:
        _replace(shrunk, name, round((hidden or 0) * factor))
    dynamic = _has_dynamic_scaling(config)
    shrunk = {name: _shrunk_value(name, value, hidden, factor, dynamic) for name, value in shrunk.items()}
    if _is_positive(width := _shared_width(config)) and width == _integer(config, ("intermediate_size",)):
        shrunk["intermediate_size"] = _shared_width(shrunk)
    return shrunk


def _shrunk_value(name: str, value: object, hidden: int | None, factor: float, dynamic: bool) -> object:
    if name in _WIDTHS:
        return _scaled(name, value, hidden, factor)
    if (name in _WINDOWS and _is_positive(value)) or (name == "max_position_embeddings" and dynamic):
        return WINDOW
    if name in _MOST and _is_integer(value):
        return min(value, _MOST[name])
    if name.startswith("vocab_size"):
        return VOCABULARY
    return value if value is None or not name.endswith("_token_id") else 1


def _shared_width(config: Mapping[str, object]) -> int | None:
    """Return what ERNIE 4.5's converter takes for the width of the MLP, judging by the shared experts'."""
    names = ("moe_intermediate_size", "moe_num_shared_experts", "num_key_value_heads")
    factors = [value for name in names if _is_positive(value := config.get(name))]
    return math.prod(factors) if len(factors) == len(names) else None


def _first_layers(config: JsonObject) -> JsonObject:
    """Return the config with as many of the first layers as it takes to have one of each kind."""
    count = _integer(config, _LAYERS)
    if not count or config.get("model_type") in _ALL_LAYERS:
        return config
    by_layer = {name: value for name, value in config.items() if isinstance(value, list) and len(value) == count > 1}
    few = max([_FEW_LAYERS, *(1 + value for name in _PERIODS if _is_integer(value := config.get(name)))])
    if _is_integer(dense := config.get("first_k_dense_replace")):
        few = max(few, dense + 1)
    for values in by_layer.values():
        kinds = [repr(value) for value in values]
        few = max(few, 1 + max(map(kinds.index, set(kinds))))
    few = min(few, count)
    changed: JsonObject = {name: few for name in (*_LAYERS, *_STACKED) if _is_integer(config.get(name))}
    changed |= {name: values[:few] for name, values in by_layer.items()}
    numbered = config.get(_BY_NUMBER)
    if isinstance(numbered, dict):
        changed[_BY_NUMBER] = {number: value for number, value in numbered.items() if int(number) < few}
    return {**config, **changed}


def _has_dynamic_scaling(config: Mapping[str, object]) -> bool:
    sections = (config.get(name) for name in ("rope_parameters", "rope_scaling"))
    return any(
        isinstance(section, dict) and "dynamic" in (section.get("rope_type"), section.get("type"))
        for section in sections
    )


def _few_heads(config: Mapping[str, object], heads: int) -> int:
    keys = _integer(config, _KEY_HEADS) or heads
    return min(heads, 2 if keys in (1, heads) else 4)


def _scaled(name: str, value: object, hidden: int | None, factor: float) -> object:
    if isinstance(value, list):
        return [_scaled(name, item, hidden, factor) for item in value]
    if not _is_positive(value):
        return value
    if hidden and value % hidden == 0:  # some models know no other width
        return value // hidden * round(hidden * factor)
    scaled, step = min(_MOST_WIDTH, math.ceil(value * factor)), 1 if name.endswith("heads") else _STEP
    return -(-scaled // step) * step


def _replace(config: JsonObject, name: str, value: int) -> None:
    if _is_integer(config.get(name)):
        config[name] = value


def _integer(config: Mapping[str, object], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if _is_integer(value := config.get(name))), None)


def _is_positive(value: object) -> TypeGuard[int]:
    return _is_integer(value) and value > 0


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
