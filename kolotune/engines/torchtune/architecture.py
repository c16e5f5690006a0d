"""What torchtune makes of a base model: the numbers of a Llama, from its ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.base_models.catalog import KNOWN
from kolotune.foundation.errors import ModelError

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
_NO_SCALING = ("default", None)


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama, in torchtune's words.

    Attributes:
        tied: whether the head is the embedding.
        rope_scale: Llama 3.1's factor of the rotary embedding; 1: none.
    """

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    norm_eps: float
    rope_base: float
    rope_scale: float
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    def linear_sizes(self) -> dict[str, int]:
        """Weights of each kind of linear layer."""
        square, narrow = self.embed_dim**2, self.embed_dim * self.num_kv_heads * self.head_dim
        mlp = self.embed_dim * self.intermediate_dim
        return {"q_proj, o_proj": square, "k_proj, v_proj": narrow, "gate_proj, up_proj, down_proj": mlp}


CONFIGS = {
    Llama(128256, 32, 32, 8, 4096, 14336, 131072, 1e-5, 500000.0, 8.0, False): "llama3_1/8B_qlora_single_device",
    Llama(128256, 28, 24, 8, 3072, 8192, 131072, 1e-5, 500000.0, 32.0, True): "llama3_2/3B_qlora_single_device",
    Llama(128256, 16, 32, 8, 2048, 8192, 131072, 1e-5, 500000.0, 32.0, True): "llama3_2/1B_qlora_single_device",
}
"""torchtune's own configs, by the exact shape that they are for: its name in any spelling, or a local copy of it."""


def read(folder: Path) -> Llama:
    """The shape of the model in `folder`.

    Raises:
        ModelError: it is none that torchtune's Llama builders can represent.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'}: can't be read: {error}", "Download the model again.") from None
    architectures = config.get("architectures") or ["model of an unnamed architecture"]
    if architectures != ["LlamaForCausalLM"]:
        raise _unknown(folder, f"it is a {', '.join(map(str, architectures))}")
    for name, wanted in _FIXED.items():
        if config.get(name, wanted) != wanted:
            raise _unknown(folder, f"it has {name} {config[name]!r}, and torchtune's Llamas have {wanted!r}")
    try:
        heads = int(config["num_attention_heads"])
        base, scale = _rope(folder, config)
        shape = Llama(
            vocab_size=int(config["vocab_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(config.get("num_key_value_heads") or heads),
            embed_dim=int(config["hidden_size"]),
            intermediate_dim=int(config["intermediate_size"]),
            max_seq_len=int(config["max_position_embeddings"]),
            norm_eps=float(config["rms_norm_eps"]),
            rope_base=base,
            rope_scale=scale,
            tied=bool(config.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unknown(folder, f"a number is missing or wrong in its config.json ({error})") from None
    if shape.embed_dim % heads or (config.get("head_dim") or shape.head_dim) != shape.head_dim:
        raise _unknown(folder, f"its heads have {config.get('head_dim')} columns, not hidden size / heads")
    if heads % shape.num_kv_heads:
        raise _unknown(folder, f"{heads} heads can't share {shape.num_kv_heads} keys and values")
    return shape


def _rope(folder: Path, config: dict[str, Any]) -> tuple[float, float]:
    """Base and scale of the rotary embedding, in transformers' old or new spelling."""
    given = config.get("rope_parameters") or {**(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    kind = given.get("rope_type", given.get("type"))
    if kind in _NO_SCALING:
        return float(given["rope_theta"]), 1.0
    if kind != "llama3":
        raise _unknown(folder, f"its rotary embedding is scaled by {kind!r}, and torchtune knows Llama 3's way only")
    for name, wanted in _LLAMA3_SCALING.items():
        if given.get(name) != wanted:
            raise _unknown(folder, f"its rotary embedding has {name} {given.get(name)}, torchtune's has {wanted}")
    return float(given["rope_theta"]), float(given["factor"])


def _unknown(folder: Path, reason: str) -> ModelError:
    names = ", ".join(known.name for known in KNOWN)
    return ModelError(
        f"torchtune can't tune {folder.name}: {reason}",
        f"It tunes {names}, and folders of other Llamas without biases; or train with --engine native.",
    )
