"""What a job says of its adapters: rank and scale of each, and which variant of LoRA they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kolotune.foundation.name_patterns import by_pattern, read_patterns
from kolotune.weights.adapter_kinds import initial_matrices
from kolotune.weights.initial_matrices import Initial

from ..job import TrainJob


@dataclass(frozen=True)
class LoraSettings:
    """The settings of new adapters.

    Attributes:
        rank, alpha: of all adapters.
        dropout: probability with which inputs of A are zeroed in training.
        rank_stabilised: whether the scale is alpha / sqrt(rank) (Kalajdzievski, "A Rank Stabilization Scaling Factor
            for Fine-Tuning with LoRA", 2023).
        has_magnitudes: whether each output's weights have a trained length (DoRA; see `dora`).
        ranks, alphas: exceptions, by patterns of names; see `foundation.name_patterns`.
        initial: the part of the base's weights that adapters start as; None: they start as nothing.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilised: bool = False
    has_magnitudes: bool = False
    initial: Initial | None = None
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, job: TrainJob) -> LoraSettings:
        """Return the settings of a job."""
        return cls(
            job.lora_rank,
            job.lora_alpha,
            job.lora_dropout,
            job.use_rslora,
            job.use_dora,
            initial_matrices(job.init_lora_weights),
            read_patterns(job.rank_pattern),
            read_patterns(job.alpha_pattern),
        )

    def of_twice_the_rank(self) -> LoraSettings:
        """Return the settings with twice the rank and the same scale."""
        factor = math.sqrt(2) if self.rank_stabilised else 2
        ranks = {name: 2 * rank for name, rank in self.ranks.items()}
        alphas = {name: factor * alpha for name, alpha in self.alphas.items()}
        return replace(self, rank=2 * self.rank, alpha=factor * self.alpha, ranks=ranks, alphas=alphas)

    def rank_of(self, name: str) -> int:
        """Return the rank of the adapter of a layer, or of a weight of experts, by its full name."""
        return int(by_pattern(self.ranks, name, self.rank))

    def scale_of(self, name: str) -> float:
        """Return the factor of the product of an adapter's matrices."""
        rank, alpha = self.rank_of(name), by_pattern(self.alphas, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
