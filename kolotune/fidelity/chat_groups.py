"""Which of the compared chats are read together: chats of like length that begin with the same tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .tasks import ComparedChat

if TYPE_CHECKING:
    from torch import Tensor

_LEAST_SHARED = 16  # tokens; for fewer another call of the model is not worth it


def group_chats(chats: Sequence[ComparedChat], most_tokens: int, padding: float = math.inf) -> Iterator[list[int]]:
    """Group chats, given as indices.

    Args:
        chats: the chats.
        most_tokens: in a group of several chats, padding included.
        padding: the most tokens, padding included, for each of the chats' own.
    """
    begins = [tuple(chat.ids[:_LEAST_SHARED]) for chat in chats]
    counts = Counter(begins)
    kinds = [begin if counts[begin] > 1 else () for begin in begins]
    group: list[int] = []
    own_tokens = 0
    for number in sorted(range(len(chats)), key=lambda number: (kinds[number], len(chats[number].ids))):
        length = len(chats[number].ids)
        tokens = (len(group) + 1) * length
        fits = tokens <= min(most_tokens, padding * (own_tokens + length))
        if group and not (fits and kinds[number] == kinds[group[0]]):
            yield group
            group, own_tokens = [], 0
        group.append(number)
        own_tokens += length
    yield group


def shared_beginning(chats: Sequence[ComparedChat], group: Sequence[int]) -> list[int]:
    """Return the ids that all chats of a group begin with, before the first prediction; empty where they are few."""
    first = chats[group[0]].ids
    most = min(min(chats[number].positions) for number in group)
    same = (len({chats[number].ids[at] for number in group}) == 1 for at in range(most))
    length = next((at for at, is_same in enumerate(same) if not is_same), most)
    return first[:length] if len(group) > 1 and length >= _LEAST_SHARED else []


def padded(chats: Sequence[ComparedChat], group: Sequence[int], begin: int = 0) -> tuple[Tensor, Tensor]:
    """Return the ids of some chats from an index on, ``[chats, longest]``, and which of them are no padding."""
    import torch

    rests = [chats[number].ids[begin:] for number in group]
    longest = max(map(len, rests))
    lengths = torch.tensor([len(rest) for rest in rests])
    ids = torch.tensor([rest + [0] * (longest - len(rest)) for rest in rests])
    return ids, torch.arange(longest) < lengths[:, None]
