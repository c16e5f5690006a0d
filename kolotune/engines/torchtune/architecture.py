"""The base models that torchtune can train: Llamas, described by their ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kolotune.base_models.catalog import KNOWN
from kolotune.foundation.errors import ModelError
from kolotune.weights.model_config import ModelConfig, RotaryEmbedding, read_model_config

_LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


@dataclass(frozen=True)
class Llama:
    """The shape of a Llama, in torchtune's terms.

    Attributes:
        tied: whether the output head is the embedding.
        rope_scale: Llama 3.1's scaling factor of the rotary embedding; 1 without scaling.
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
        """Return the number of weights of each kind of linear layer."""
        square, narrow = self.embed_dim**2, self.embed_dim * self.num_kv_heads * self.head_dim
        mlp = self.embed_dim * self.intermediate_dim
        return {"q_proj, o_proj": square, "k_proj, v_proj": narrow, "gate_proj, up_proj, down_proj": mlp}


CONFIGS = {
    Llama(128256, 32, 32, 8, 4096, 14336, 131072, 1e-5, 500000.0, 8.0, False): "llama3_1/8B_qlora_single_device",
    Llama(128256, 28, 24, 8, 3072, 8192, 131072, 1e-5, 500000.0, 32.0, True): "llama3_2/3B_qlora_single_device",
    Llama(128256, 16, 32, 8, 2048, 8192, 131072, 1e-5, 500000.0, 32.0, True): "llama3_2/1B_qlora_single_device",
}
"""torchtune's own configs by the exact shape they are for, whatever the model's folder is called."""


def read(folder: Path) -> Llama:
    """Read the shape of the model in `folder`.

    Raises:
        ModelError: torchtune's Llama builders can't represent it.
    """
    config = read_model_config(folder)
    if config.architectures != ("LlamaForCausalLM",):
        raise _unknown(folder, f"it is a {', '.join(config.architectures) or 'model of an unnamed architecture'}")
    for name, fixed in _FIXED.items():
        if config.values.get(name, fixed) != fixed:
            raise _unknown(folder, f"it has {name} {config.values[name]!r}, and torchtune's Llamas have {fixed!r}")
    scale = _rope_scale(folder, config.rotary)
    try:
        shape = _shape(config, scale)
    except ModelError as error:
        raise _unknown(folder, f"a setting is missing or wrong: {error.cause}") from None
    if shape.embed_dim % shape.num_heads or config.head_size != shape.head_dim:
        raise _unknown(folder, f"its heads are {config.head_size} wide, not hidden size / heads")
    if shape.num_heads % shape.num_kv_heads:
        raise _unknown(folder, f"{shape.num_heads} heads can't share {shape.num_kv_heads} keys and values")
    return shape


def _shape(config: ModelConfig, rope_scale: float) -> Llama:
    return Llama(
        vocab_size=config.required_integer("vocab_size"),
        num_layers=config.required_integer("num_hidden_layers"),
        num_heads=config.required_integer("num_attention_heads"),
        num_kv_heads=config.key_value_heads,
        embed_dim=config.required_integer("hidden_size"),
        intermediate_dim=config.required_integer("intermediate_size"),
        max_seq_len=config.required_integer("max_position_embeddings"),
        norm_eps=config.number("rms_norm_eps"),
        rope_base=config.rotary.theta,
        rope_scale=rope_scale,
        tied=config.ties_embeddings,
    )


def _rope_scale(folder: Path, rotary: RotaryEmbedding) -> float:
    """Return the factor by which the rotary embedding is scaled."""
    if rotary.kind == "default":
        return 1.0
    if rotary.kind != "llama3":
        raise _unknown(folder, f"its rotary embedding is scaled by {rotary.kind!r}, and torchtune knows only llama3")
    for name, fixed in _LLAMA3_SCALING.items():
        value = rotary.values.get(name)
        if value != fixed:
            raise _unknown(folder, f"its rotary embedding has {name} {value}, and torchtune's has {fixed}")
    return rotary.number("factor")


def _unknown(folder: Path, reason: str) -> ModelError:
    names = ", ".join(known.name for known in KNOWN)
    return ModelError(
        f"torchtune can't train {folder.name}: {reason}",
        f"It trains {names}, and folders of other Llamas without biases. Or train with --engine native.",
    )
