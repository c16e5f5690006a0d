"""The figures of one model: loss, divergence, ends of answers, and prompts that get the trained tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kolotune.foundation.errors import KolotuneError

from . import divergence
from .defects import Defect, DefectKind, defect
from .log_probabilities import loss_of, split
from .tasks import Figures, Prompt, Reference

if TYPE_CHECKING:
    import numpy as np


def compute_figures(
    reference: Reference, before: np.ndarray, after: np.ndarray, prompts_equal: int, defects: list[Defect]
) -> Figures:
    """Compute the figures of a model from its log-probabilities.

    Args:
        reference: the chats that were measured.
        before: log-probabilities that the model is compared with, fp32 ``[positions, vocabulary]``.
        after: the model's own.
        prompts_equal: prompts of the reference that get the trained tokens.
        defects: what is already known to be wrong with the model.
    """
    apart = divergence.between(before, after)
    by_chat = list(split(after, reference.chats))
    loss = sum(loss_of(array, chat) for array, chat in by_chat) / sum(reference.labels)
    stops = 0
    for number, end in reference.stops:
        array, chat = by_chat[number]
        stops += int(array[end].argmax()) == chat.ids[chat.positions[end] + 1]
    return Figures(
        loss=loss,
        top1_agreement=apart.top1_agreement,
        kl_mean=apart.kl_mean,
        kl_p99=apart.kl_p99,
        stops=stops,
        prompts_equal=prompts_equal,
        prompts=len(reference.prompts),
        defects=defects,
    )


def compare_prompts(prompts: Sequence[Prompt], ids_of: Callable[[Prompt], list[int]]) -> tuple[int, list[Defect]]:
    """Count the prompts that get the trained ids; describe the first that does not as a defect."""
    equal, reason = 0, ""
    for prompt in prompts:
        try:
            ids = ids_of(prompt)
        except KolotuneError as error:
            reason = reason or error.cause
            continue
        if ids == prompt.ids:
            equal += 1
        elif not reason:
            pairs = enumerate(zip(ids, prompt.ids, strict=False))
            first = next((at for at, (one, other) in pairs if one != other), min(len(ids), len(prompt.ids)))
            reason = f"the first one from token {first + 1} ({len(ids)} tokens, {len(prompt.ids)} in training)"
    if not reason:
        return equal, []
    return equal, [defect(DefectKind.PROMPTS_DIFFER, count=len(prompts) - equal, of=len(prompts), reason=reason)]
