"""The families that the decoder computes, each as its differences from Llama; PyTorch is not needed to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from kolotune.weights.model_config import ModelConfig

Setting: TypeAlias = bool | int | float | str | None


class Norms(Enum):
    """Where a layer normalizes."""

    BEFORE = "in front of attention and MLP"
    AFTER = "behind attention and MLP"
    AROUND = "in front of both and behind both"


def _all_full(config: ModelConfig, settings: Settings) -> list[bool]:
    return [False] * config.layers


def _all_sliding(config: ModelConfig, settings: Settings) -> list[bool]:
    return [True] * config.layers


def _all_but_every(config: ModelConfig, settings: Settings) -> list[bool]:
    """Every n-th layer sees everything; n is `sliding_window_pattern`."""
    every = settings.integer("sliding_window_pattern")
    return [not every or (index + 1) % every != 0 for index in range(config.layers)]


def _from_max_window_layers(config: ModelConfig, settings: Settings) -> list[bool]:
    """The last layers see only a window, where it is turned on."""
    first = settings.integer("max_window_layers")
    return [bool(settings["use_sliding_window"]) and index >= first for index in range(config.layers)]


def _not_turning(config: ModelConfig, settings: Settings) -> list[bool]:
    """The layers that don't turn, where windows are turned on."""
    on = bool(settings["use_sliding_window"] and settings["sliding_window"])
    return [on and not turns for turns in _turn_by_list(config, settings, [])]


def _turn_everywhere(config: ModelConfig, settings: Settings, sliding: list[bool]) -> list[bool]:
    return [True] * config.layers


def _turn_by_list(config: ModelConfig, settings: Settings, sliding: list[bool]) -> list[bool]:
    """`no_rope_layers` has a 1 for each layer that turns, or every n-th layer does not."""
    found = config.values.get("no_rope_layers")
    if isinstance(found, list):
        return [bool(each) for each in found[: config.layers]]
    every = settings.integer("no_rope_layer_interval")
    return [(index + 1) % every != 0 for index in range(config.layers)]


def _turn_in_windows(config: ModelConfig, settings: Settings, sliding: list[bool]) -> list[bool]:
    """Layers that see everything don't turn, unless no layer has a window."""
    return sliding if settings["sliding_window"] else [True] * config.layers


@dataclass(frozen=True)
class ExpertFiles:
    """How the files of a family name the experts of a layer.

    Attributes:
        block: the module of router and experts.
        gate, up, down: the matrices of an expert.
        normalizes: the setting that says whether the scores of a token's experts are divided by their sum; "" if they
            always are.
    """

    block: str
    gate: str
    up: str
    down: str
    normalizes: str = ""


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama.

    Attributes:
        settings: the settings of its ``config.json`` that the decoder reads besides Llama's, or with a different
            default, by name; the value holds where the file has none. Other families ignore a setting.
        norms: where its layers normalize.
        norms_stored_less: by how much less than they are the weights of its norms are stored.
        scales_embeddings: whether embeddings are multiplied by the root of their width.
        is_fused: whether queries, keys and values are one linear layer, and gate and up another.
        lists_layers: whether its files list which layers have windows, as `layer_types`.
        sliding: returns which layers see only a window, for files that don't list it.
        turning: returns which layers turn queries and keys by their positions.
        experts: how its files name experts; None if it has none.
    """

    settings: Mapping[str, Setting] = field(default_factory=dict)
    norms: Norms = Norms.BEFORE
    norms_stored_less: int = 0
    scales_embeddings: bool = False
    is_fused: bool = False
    lists_layers: bool = False
    sliding: Callable[[ModelConfig, Settings], list[bool]] = _all_full
    turning: Callable[[ModelConfig, Settings, list[bool]], list[bool]] = _turn_everywhere
    experts: ExpertFiles | None = None


class Settings:
    """The settings of a model that its family knows."""

    def __init__(self, config: ModelConfig, family: Family) -> None:
        self._known = {**_LLAMA, **family.settings}
        self._values = config.text

    def __getitem__(self, name: str) -> object:
        """Return a setting; None if the family does not know it."""
        return self._values.get(name, self._known[name]) if name in self._known else None

    def number(self, name: str) -> float | None:
        """Return a setting if it is a number."""
        found = self[name]
        return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None

    def integer(self, name: str) -> int:
        """Return a setting as a whole number; 0 for none."""
        return int(self.number(name) or 0)


_LLAMA: Mapping[str, Setting] = {
    "hidden_act": "silu",
    "head_dim": None,
    "num_attention_heads": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
}
_QWEN = Family(
    {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    lists_layers=True,
    sliding=_from_max_window_layers,
)
_GEMMA_2: Mapping[str, Setting] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 4096}, sliding=_all_sliding),
    "ministral": Family({"sliding_window": 4096}, lists_layers=True, sliding=_all_sliding),
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "qwen3_moe": Family(
        {
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        sliding=_all_sliding,
        experts=ExpertFiles("mlp", "gate_proj", "up_proj", "down_proj", normalizes="norm_topk_prob"),
    ),
    "mixtral": Family(
        {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0, "sliding_window": None, "num_experts_per_tok": 2},
        sliding=_all_sliding,
        experts=ExpertFiles("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "gemma": Family(
        {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256},
        norms_stored_less=1,
        scales_embeddings=True,
    ),
    "gemma2": Family(
        {**_GEMMA_2, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norms=Norms.AROUND,
        norms_stored_less=1,
        scales_embeddings=True,
        lists_layers=True,
        sliding=_all_but_every,
    ),
    "gemma3_text": Family(
        {
            **_GEMMA_2,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        norms=Norms.AROUND,
        norms_stored_less=1,
        scales_embeddings=True,
        lists_layers=True,
        sliding=_all_but_every,
    ),
    "phi3": Family(
        {
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
            "rms_norm_eps": 1e-5,
            "original_max_position_embeddings": 4096,
        },
        is_fused=True,
        sliding=_all_sliding,
    ),
    "smollm3": Family(
        {
            "rope_theta": 2_000_000.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "no_rope_layer_interval": 4,
        },
        lists_layers=True,
        sliding=_not_turning,
        turning=_turn_by_list,
    ),
    "granite": Family(
        {
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "olmo2": Family({"rms_norm_eps": 1e-5}, norms=Norms.AFTER),
    "olmo3": Family(
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "rope_local_base_freq": 500_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        norms=Norms.AFTER,
        lists_layers=True,
        sliding=_all_but_every,
    ),
    "exaone4": Family(
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "sliding_window_pattern": 4},
        norms=Norms.AFTER,
        lists_layers=True,
        sliding=_all_but_every,
        turning=_turn_in_windows,
    ),
}
"""By `model_type`."""
