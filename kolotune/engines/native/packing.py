"""Chats laid end to end as one row of tokens: no work for padding, and a beginning they share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prepared_tokens import IGNORED, PreparedTokens

TOKEN_BUDGET = 1024
"""Tokens computed at once. More make no product faster on a CPU, and each costs memory until its backward pass."""

LONG = 512
"""Own tokens from which on a chat is a long one: it gets another attention, which shares nothing."""

_WORTH_SHARING = 8  # a shorter beginning costs more to keep apart than it saves


@dataclass(frozen=True)
class Packed:
    """Chats end to end, behind the beginning that all of them share.

    Attributes:
        ids: int64 ``[row]``: the shared beginning, then each chat's own tokens.
        positions: int64 ``[row]``: each token's place in its own chat.
        prefix: length of the shared beginning; 0 when nothing is shared.
        lengths: own tokens of each chat, in the row's order.
        rows: int64 ``[labels]``: where in the row a token stands whose next one is labelled.
        targets: int64 ``[labels]``: that next token.
        tokens: tokens of the chats, the shared ones counted in each.
    """

    ids: Tensor
    positions: Tensor
    prefix: int
    lengths: tuple[int, ...]
    rows: Tensor
    targets: Tensor
    tokens: int

    @property
    def labels(self) -> int:
        return len(self.targets)


def pack(tokens: PreparedTokens, indices: Sequence[int], share: bool) -> Packed:
    """The chats `indices` as one row.

    Args:
        tokens: all chats.
        indices: which of them, in the row's order. Of each, what stands before its last label: nothing else can
            change the loss.
        share: compute a common beginning once. Exact, as attention only looks back and no label stands there; with
            dropout the chats would share its draws too.
    """
    whole = [tokens.chat(index) for index in indices]
    chats = [chat for chat in map(_before_last_label, whole) if len(chat[0])] or whole[:1]
    prefix = _shared_beginning(chats) if share and len(chats) > 1 else 0
    if max(len(ids) for ids, _ in chats) - prefix > LONG:
        prefix = 0
    parts, places, rows, targets = [chats[0][0][:prefix]], [torch.arange(prefix)], [], []
    start = prefix
    for ids, labels in chats:
        own = ids[prefix:]
        parts.append(own)
        places.append(torch.arange(prefix, len(ids)))
        following = labels[prefix + 1 :]
        where = (following != IGNORED).nonzero().squeeze(1)
        rows.append(where + start)
        targets.append(following[where])
        start += len(own)
    return Packed(
        ids=torch.cat(parts),
        positions=torch.cat(places),
        prefix=prefix,
        lengths=tuple(len(ids) - prefix for ids, _ in chats),
        rows=torch.cat(rows),
        targets=torch.cat(targets),
        tokens=sum(len(ids) for ids, _ in whole),
    )


def _before_last_label(chat: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A chat's ids ``[length]``, without its last labelled token and what follows, and labels ``[length + 1]``."""
    ids, labels = chat
    labelled = (labels[1:] != IGNORED).nonzero()
    length = int(labelled[-1]) + 1 if len(labelled) else 0
    return ids[:length], labels[: length + 1]


def _shared_beginning(chats: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Tokens that all chats begin with; none of them, nor the first behind them, is labelled."""
    first = chats[0][0]
    limit = min(len(ids) for ids, _ in chats)
    for _, labels in chats:
        labelled = (labels[1:] != IGNORED).nonzero()
        if len(labelled):
            limit = min(limit, int(labelled[0]))
    for ids, _ in chats[1:]:
        differing = (ids[:limit] != first[:limit]).nonzero()
        if len(differing):
            limit = min(limit, int(differing[0]))
    return limit if limit >= _WORTH_SHARING else 0


def costs(tokens: PreparedTokens, indices: Sequence[int], share: bool, label: float) -> dict[int, float]:
    """What each of the chats `indices` takes to compute, in tokens: its own ones, and `label` for each logit."""
    chats = {index: _before_last_label(tokens.chat(index)) for index in indices}
    full = [chat for chat in chats.values() if len(chat[0])]
    prefix = _shared_beginning(full) if share and len(full) > 1 else 0
    return {index: max(0, len(ids) - prefix) + label * tokens.label_count(index) for index, (ids, _) in chats.items()}


def grouped(tokens: PreparedTokens, indices: Sequence[int], budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """The chats of one step in groups of at most `budget` tokens and near-equal length; a longer chat is alone."""
    lengths = {index: tokens.chat_length(index) for index in indices}
    groups: list[list[int]] = []
    room = 0
    for index in sorted(indices, key=lambda each: (-lengths[each], each)):
        if not groups or lengths[index] > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= lengths[index]
    return groups
