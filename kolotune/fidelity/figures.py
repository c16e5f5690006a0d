"""The figures of one model: loss, divergence, and ends of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import divergence
from .compared_prompts import ComparedPrompts
from .defects import Defect
from .log_probabilities import loss_of, split
from .tasks import Figures, Reference

if TYPE_CHECKING:
    import numpy as np


def compute_figures(
    reference: Reference, before: np.ndarray, after: np.ndarray, prompts: ComparedPrompts, defects: list[Defect]
) -> Figures:
    """Compute the figures of a model from its log-probabilities.

    Args:
        reference: the chats that were measured.
        before: log-probabilities that the model is compared with, fp32 ``[positions, vocabulary]``.
        after: the model's own.
        prompts: how many of them get the trained tokens.
        defects: what else is already known to be wrong with the model.
    """
    apart = divergence.between(before, after)
    by_chat = list(split(after, reference.chats))
    losses = [loss_of(array, chat) for array, chat in by_chat]
    stops = 0
    for number, end in reference.stops:
        array, chat = by_chat[number]
        stops += int(array[end].argmax()) == chat.ids[chat.positions[end] + 1]
    return Figures(
        loss=sum(losses) / sum(reference.chat_weights),
        top1_agreement=apart.top1_agreement,
        kl_mean=apart.kl_mean,
        kl_p99=apart.kl_p99,
        stops=stops,
        prompts_equal=prompts.equal,
        prompts=prompts.of,
        defects=[*prompts.defects, *defects],
        chat_losses=losses,
    )
