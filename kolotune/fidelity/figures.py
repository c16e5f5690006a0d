"""From log-probabilities to figures; the files that they are kept in while a comparison lasts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import KolotuneError

from . import divergence
from .tasks import ComparedChat, Figures, Prompt, Reference

if TYPE_CHECKING:
    import numpy as np

REFERENCE, TUNED, MERGED, GGUF = "reference.json", "tuned.npy", "merged.npy", "gguf.npy"


def keep(path: Path, chats: Sequence[ComparedChat], rows: Iterable[np.ndarray]) -> np.ndarray:
    """Writes the rows of all chats, fp32 ``[positions, words]``, one chat at a time; they are mapped, not loaded."""
    import numpy as np

    total = sum(len(each.positions) for each in chats)
    kept: np.ndarray | None = None
    at = 0
    for part in rows:
        if kept is None:
            kept = np.lib.format.open_memmap(path, "w+", np.float32, (total, part.shape[1]))
        kept[at : at + len(part)] = part
        at += len(part)
    assert kept is not None and at == total
    return kept


def load(path: Path) -> np.ndarray:
    """What `keep` wrote, mapped."""
    import numpy as np

    loaded: np.ndarray = np.load(path, mmap_mode="r")
    return loaded


def split(rows: np.ndarray, chats: Sequence[ComparedChat]) -> Iterator[tuple[np.ndarray, ComparedChat]]:
    """The rows of each chat."""
    at = 0
    for chat in chats:
        yield rows[at : at + len(chat.positions)], chat
        at += len(chat.positions)


def loss_of(rows: np.ndarray, chat: ComparedChat) -> float:
    """The summed loss of a chat's labelled tokens."""
    import numpy as np

    wanted = [chat.ids[at + 1] for at in chat.positions]
    return -float(np.asarray(rows, np.float64)[np.arange(len(wanted)), wanted].sum())


def compared(reference: Reference, before: np.ndarray, after: np.ndarray, equal: int, wrong: list[str]) -> Figures:
    """The figures of a model, from its log-probabilities and those it is held against.

    Args:
        reference: says what was asked.
        before, after: fp32 ``[positions, words]``.
        equal: of the reference's prompts so many get the right tokens.
        wrong: what else is wrong with it.
    """
    apart = divergence.between(before, after)
    kept = list(split(after, reference.chats))
    loss = sum(loss_of(rows, chat) for rows, chat in kept) / sum(reference.labels)
    ends = 0
    for number, place in reference.stops:
        rows, chat = kept[number]
        ends += int(rows[place].argmax()) == chat.ids[chat.positions[place] + 1]
    return Figures(loss, apart.top1_agreement, apart.kl_mean, apart.kl_p99, ends, equal, len(reference.prompts), wrong)


def prompts_equal(prompts: Sequence[Prompt], ids_of: Callable[[Prompt], list[int]]) -> tuple[int, list[str]]:
    """How many prompts get the ids that they should, and what is wrong with the first that does not."""
    equal, wrong = 0, ""
    for prompt in prompts:
        try:
            ids = ids_of(prompt)
        except KolotuneError as error:
            wrong = wrong or error.cause
            continue
        if ids == prompt.ids:
            equal += 1
        elif not wrong:
            at = next(
                (at for at, (one, other) in enumerate(zip(ids, prompt.ids, strict=False)) if one != other),
                min(len(ids), len(prompt.ids)),
            )
            wrong = f"from token {at + 1} on (of {len(prompt.ids)}, here {len(ids)})"
    if not wrong:
        return equal, []
    return equal, [f"{len(prompts) - equal} of {len(prompts)} prompts get other tokens than in training: {wrong}"]
