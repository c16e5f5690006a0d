"""What the decoder needs to know of a model besides its weights, read from ``config.json`` by its family's row.

PyTorch is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kolotune.weights.model_config import ModelConfig, RotaryEmbedding

from .families import FAMILIES, Family, Settings
from .rotary_settings import FULL, SLIDING, read_rotary, rotated_share


class Activation(StrEnum):
    """The activations that the decoder computes, as transformers calls them."""

    SILU = "silu"
    TANH_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class AttentionPattern:
    """How the attention of some layers differs from that of others.

    Attributes:
        window: tokens that a query sees, its own included; None for all.
        rotary: how queries and keys are turned; None if they are not.
    """

    window: int | None
    rotary: RotaryEmbedding | None


@dataclass(frozen=True)
class Architecture:
    """A model's architecture.

    Attributes:
        family: its family.
        queries, keys, head_width: numbers of heads, and their width.
        layers: each layer's attention, in order.
        rotated_share: share of each head that is turned.
        score_scale: factor of the product of a query and a key; half of its logarithm goes to each of them.
        score_cap: scores stay below this, by tanh; 0.0 for no cap.
        activation: as transformers calls it.
        epsilon: of the norms.
        embedding_factor: of the embeddings.
        block_factor: of what attention and MLP add.
        logit_factor: of the logits.
        logit_cap: as `score_cap`, for the logits.
        chosen_experts: experts of each token; 0 without experts.
        normalizes_experts: whether the scores of a token's experts are divided by their sum.
    """

    family: Family
    queries: int
    keys: int
    head_width: int
    layers: tuple[AttentionPattern, ...]
    rotated_share: float
    score_scale: float
    score_cap: float
    activation: str
    epsilon: float
    embedding_factor: float
    block_factor: float
    logit_factor: float
    logit_cap: float
    chosen_experts: int = 0
    normalizes_experts: bool = False

    @property
    def patterns(self) -> tuple[AttentionPattern, ...]:
        """The different patterns of the layers."""
        patterns: list[AttentionPattern] = []
        for pattern in self.layers:
            if pattern not in patterns:
                patterns.append(pattern)
        return tuple(patterns)


def read_architecture(config: ModelConfig) -> Architecture:
    """Return a model's architecture.

    Raises:
        KeyError: its family is unknown.
        ModelError: a setting has the wrong type.
    """
    family = FAMILIES[config.model_type]
    settings = Settings(config, family)
    queries = settings.integer("num_attention_heads") or 1
    head_width = settings.integer("head_dim") or config.hidden_size // queries
    multiplier, scalar = settings.number("attention_multiplier"), settings.number("query_pre_attn_scalar")
    return Architecture(
        family=family,
        queries=queries,
        keys=settings.integer("num_key_value_heads") or queries,
        head_width=head_width,
        layers=_layers(config, settings, family),
        rotated_share=rotated_share(config, settings),
        score_scale=(scalar or head_width) ** -0.5 if multiplier is None else multiplier,
        score_cap=settings.number("attn_logit_softcapping") or 0.0,
        activation=_activation(config, settings),
        epsilon=settings.number("rms_norm_eps") or 0.0,
        embedding_factor=config.hidden_size**0.5
        if family.scales_embeddings
        else settings.number("embedding_multiplier") or 1.0,
        block_factor=settings.number("residual_multiplier") or 1.0,
        logit_factor=1 / (settings.number("logits_scaling") or 1.0),
        logit_cap=settings.number("final_logit_softcapping") or 0.0,
        chosen_experts=settings.integer("num_experts_per_tok"),
        normalizes_experts=family.experts is not None
        and (not family.experts.normalizes or bool(settings[family.experts.normalizes])),
    )


def _activation(config: ModelConfig, settings: Settings) -> str:
    found = str(settings["hidden_activation"] or settings["hidden_act"])
    # The files of the first Gemma say "gelu" for the approximation by tanh.
    return Activation.TANH_GELU if found == "gelu" and config.model_type == "gemma" else found


def _layers(config: ModelConfig, settings: Settings, family: Family) -> tuple[AttentionPattern, ...]:
    listed = config.layer_types if family.lists_layers else ()
    sliding = [kind == SLIDING for kind in listed] or family.sliding(config, settings)
    window = settings.integer("sliding_window") or None
    if settings["use_sliding_window"] is False:
        window = None
    turning = family.turning(config, settings, sliding)
    return tuple(
        AttentionPattern(
            window if slides else None,
            read_rotary(config, settings, SLIDING if slides else FULL) if turns else None,
        )
        for slides, turns in zip(sliding, turning, strict=True)
    )
