"""The angles by which a rotary embedding turns per position, and their scalings for long contexts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kolotune.weights.model_config import RotaryEmbedding

from .rotary_settings import LONG


def frequencies(rotary: RotaryEmbedding, width: int) -> tuple[Tensor, float]:
    """Return the angles per position, fp32 ``[width / 2]``, and a factor of cosine and sine.

    Sources: Su et al., "RoFormer", 2021. "llama3" is the scaling of Llama 3.1: long waves are stretched by `factor`,
    short ones kept, and those between are blended. "yarn": Peng et al., "YaRN", 2023. "longrope": Ding et al.,
    "LongRoPE", 2024, up to the length that the model was first trained with.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    plain: Tensor = 1.0 / rotary.theta**exponents
    if rotary.kind == "linear":
        return plain / rotary.number("factor"), 1.0
    if rotary.kind == "llama3":
        return _llama3(rotary, plain), 1.0
    if rotary.kind == "yarn":
        return _yarn(rotary, plain), _yarn_factor(rotary)
    if rotary.kind == LONG:
        short = torch.tensor(rotary.numbers("short_factor"), dtype=torch.float32)
        return 1.0 / (short * rotary.theta**exponents), _long_factor(rotary)
    return plain, 1.0


def _llama3(rotary: RotaryEmbedding, plain: Tensor) -> Tensor:
    factor, low, high = (rotary.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = rotary.number("original_max_position_embeddings") * plain / (2 * math.pi)
    blend: Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * plain / factor + blend * plain


def _yarn(rotary: RotaryEmbedding, plain: Tensor) -> Tensor:
    """Stretch waves that turn less than `beta_slow` times in the original length, and keep those above `beta_fast`."""
    length, half = rotary.number("original_max_position_embeddings"), len(plain)

    def dimension(turns: float) -> float:
        return half * math.log(length / (turns * 2 * math.pi)) / math.log(rotary.theta)

    low = max(math.floor(dimension(rotary.number("beta_fast", 32.0))), 0)
    high = min(math.ceil(dimension(rotary.number("beta_slow", 1.0))), 2 * half - 1)
    stretched = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / rotary.number("factor") * stretched + plain * (1 - stretched)


def _yarn_factor(rotary: RotaryEmbedding) -> float:
    factor = rotary.number("factor")
    return rotary.number("attention_factor", 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)


def _long_factor(rotary: RotaryEmbedding) -> float:
    original = rotary.number("original_max_position_embeddings")
    factor = rotary.number("factor", rotary.number("max_position_embeddings") / original)
    return rotary.number("attention_factor", math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(original)))
