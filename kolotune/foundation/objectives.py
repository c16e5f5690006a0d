"""What a training can aim at: the objectives, the data that each learns from, and their own defaults.

The table is part of `foundation` because options are resolved here, and reading, preparing and training all ask it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

ObjectiveName: TypeAlias = Literal["sft", "text", "dpo", "ipo", "simpo", "orpo", "kto"]


class LearnsFrom(StrEnum):
    """What a record of the training data is."""

    CHATS = "chats"
    TEXT = "text"
    """A document, every token of which counts."""
    PAIRS = "pairs"
    """Two answers to one prompt, of which one is preferred."""
    RATED = "rated"
    """An answer that is good or bad; a pair is one of each."""


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        summary: what ``--help`` says of it.
        learns_from: see `LearnsFrom`.
        beta: the default of `Config.beta`; 0 where there is no such number.
        has_reference: whether answers are compared with those of the model before the training.
        loss_options: the options that its loss has; see `LOSS_OPTIONS`.
        estimates_divergence: whether each step estimates how far the model is from that, in a forward pass of its own.
    """

    summary: str
    learns_from: LearnsFrom
    beta: float = 0.0
    loss_options: tuple[str, ...] = ("beta",)
    has_reference: bool = False
    estimates_divergence: bool = False

    @property
    def has_preferences(self) -> bool:
        """Whether it learns from answers that somebody compared or rated."""
        return self.learns_from in (LearnsFrom.PAIRS, LearnsFrom.RATED)


OBJECTIVES: Mapping[str, Objective] = {
    "sft": Objective("the answers of chats", LearnsFrom.CHATS, loss_options=()),
    "text": Objective("all of plain texts", LearnsFrom.TEXT, loss_options=()),
    "dpo": Objective("preferred answers over rejected ones", LearnsFrom.PAIRS, 0.1, has_reference=True),
    "ipo": Objective("the same, by a fixed margin", LearnsFrom.PAIRS, 0.1, has_reference=True),
    "simpo": Objective(
        "the same, by mean log-probabilities alone", LearnsFrom.PAIRS, 2.0, loss_options=("beta", "simpo_gamma")
    ),
    "orpo": Objective("preferred answers, and their odds over rejected ones", LearnsFrom.PAIRS, 0.1),
    "kto": Objective(
        "answers that are labelled good or bad", LearnsFrom.RATED, 0.1,
        loss_options=("beta", "desirable_weight", "undesirable_weight"), has_reference=True, estimates_divergence=True,
    ),
}  # fmt: skip

LOSS_OPTIONS = ("beta", "simpo_gamma", "desirable_weight", "undesirable_weight")
"""Options that are a part of the loss: losses with different values of them can't be compared."""


def beta_of(objective: str, beta: float | None) -> float:
    """Return beta as given, or the objective's default."""
    return OBJECTIVES[objective].beta if beta is None else beta
