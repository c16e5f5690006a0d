"""Packed sequences: chats end to end, without padding; a prefix that all share is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prepared_tokens import IGNORED, PreparedTokens

TOKEN_BUDGET = 1024
"""Tokens computed at once. More don't make products faster on a CPU, and each takes memory until its backward pass."""

LONG = 512
"""Tokens after the shared prefix from which on a chat counts as long: its attention shares no prefix."""

_SHORTEST_PREFIX = 8  # a shorter prefix costs more than sharing it saves


@dataclass(frozen=True)
class PackedSequence:
    """Chats end to end, after the prefix that all of them share.

    Attributes:
        ids: int64 ``[length]``: the shared prefix, then each chat's other tokens.
        positions: int64 ``[length]``: each token's position in its chat.
        prefix: length of the shared prefix; 0 without one.
        lengths: tokens of each chat after the prefix.
        label_positions: int64 ``[labels]``: indices into `ids` of tokens whose next token is a label.
        targets: int64 ``[labels]``: that next token.
        tokens: tokens of the chats, the prefix counted in each.
    """

    ids: Tensor
    positions: Tensor
    prefix: int
    lengths: tuple[int, ...]
    label_positions: Tensor
    targets: Tensor
    tokens: int

    @property
    def labels(self) -> int:
        return len(self.targets)


def pack(tokens: PreparedTokens, indices: Sequence[int], share: bool) -> PackedSequence:
    """Pack chats into one sequence.

    Args:
        tokens: all chats.
        indices: the chats to pack, in order. Each ends before its last label: later tokens can't change the loss.
        share: compute a common prefix once. The result is the same, as attention is causal and the prefix has no
            labels; but with dropout, chats would share the prefix's random mask.
    """
    whole = [tokens.chat(index) for index in indices]
    chats = [chat for chat in map(_before_last_label, whole) if len(chat[0])] or whole[:1]
    prefix = _shared_prefix(chats) if share and len(chats) > 1 else 0
    if max(len(ids) for ids, _ in chats) - prefix > LONG:
        prefix = 0
    parts, positions, label_positions, targets = [chats[0][0][:prefix]], [torch.arange(prefix)], [], []
    start = prefix
    for ids, labels in chats:
        own = ids[prefix:]
        parts.append(own)
        positions.append(torch.arange(prefix, len(ids)))
        following = labels[prefix + 1 :]
        where = (following != IGNORED).nonzero().squeeze(1)
        label_positions.append(where + start)
        targets.append(following[where])
        start += len(own)
    return PackedSequence(
        ids=torch.cat(parts),
        positions=torch.cat(positions),
        prefix=prefix,
        lengths=tuple(len(ids) - prefix for ids, _ in chats),
        label_positions=torch.cat(label_positions),
        targets=torch.cat(targets),
        tokens=sum(len(ids) for ids, _ in whole),
    )


def _before_last_label(chat: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a chat's ids ``[length]`` up to its last label, without it, and the labels ``[length + 1]``."""
    ids, labels = chat
    labelled = (labels[1:] != IGNORED).nonzero()
    length = int(labelled[-1]) + 1 if len(labelled) else 0
    return ids[:length], labels[: length + 1]


def _shared_prefix(chats: Sequence[tuple[Tensor, Tensor]]) -> int:
    """Return the length of the prefix that all chats share; no token in it, nor the first after it, is a label."""
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
    return limit if limit >= _SHORTEST_PREFIX else 0


def costs(tokens: PreparedTokens, indices: Sequence[int], share: bool, label: float) -> dict[int, float]:
    """Return the cost of each chat in tokens: those after the shared prefix, and `label` for each logit."""
    chats = {index: _before_last_label(tokens.chat(index)) for index in indices}
    full = [chat for chat in chats.values() if len(chat[0])]
    prefix = _shared_prefix(full) if share and len(full) > 1 else 0
    return {index: max(0, len(ids) - prefix) + label * tokens.label_count(index) for index, (ids, _) in chats.items()}


def group_by_length(tokens: PreparedTokens, indices: Sequence[int], budget: int = TOKEN_BUDGET) -> list[list[int]]:
    """Group chats of similar length, at most `budget` tokens a group; a longer chat has a separate group."""
    lengths = {index: tokens.chat_length(index) for index in indices}
    groups: list[list[int]] = []
    capacity = 0
    for index in sorted(indices, key=lambda each: (-lengths[each], each)):
        if not groups or lengths[index] > capacity:
            groups.append([])
            capacity = budget
        groups[-1].append(index)
        capacity -= lengths[index]
    return groups
