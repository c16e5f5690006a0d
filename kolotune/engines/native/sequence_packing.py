"""Packed sequences: chats end to end, without padding; a prefix that all share is computed once.

Of a chat with several sequences, each follows as a branch the one that it leaves (`branches`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..memory import BatchShape
from ..prepared_tokens import PreparedTokens
from .branches import Branch, branches_of, common_prefix
from .transfers import to_device

TOKEN_BUDGET = 1024
"""Tokens computed at once. More don't make products faster on a CPU, and each takes memory until its backward pass."""

DEVICE_TOKEN_BUDGET = 4096
"""The same on a GPU, whose products are faster with more: a guess, not measured."""

LONG = 512
"""Tokens after the shared prefix from which on a chat counts as long: its attention shares no prefix."""

_SHORTEST_PREFIX = 8  # a shorter prefix costs more than sharing it saves


@dataclass(frozen=True)
class Segment:
    """Tokens that lie end to end in a packed sequence, and see those before them: a chat, a branch, the prefix.

    Attributes:
        start, length: its own tokens.
        front: int64: the tokens that it sees in front of its own.
    """

    start: int
    length: int
    front: Tensor

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class PackedSequence:
    """Chats end to end, after the prefix that all of them share.

    Attributes:
        ids: int64 ``[length]``: the shared prefix, then each chat's other tokens, then those of its branches.
        positions: int64 ``[length]``: each token's position in its sequence.
        prefix: length of the shared prefix; 0 without one.
        lengths: tokens of each chat or branch after what it shares.
        fronts: for each chat or branch, int64: the tokens that it shares, the prefix or more.
        label_positions: int64 ``[labels]``: indices into `ids` of tokens whose next token is a label, ascending.
        targets: int64 ``[labels]``: that next token.
        weights: fp32 ``[labels]``: how much the loss on it counts; None: in full.
        sequences: int64 ``[labels]``: the number of the sequence that it belongs to.
    """

    ids: Tensor
    positions: Tensor
    prefix: int
    lengths: tuple[int, ...]
    fronts: tuple[Tensor, ...]
    label_positions: Tensor
    targets: Tensor
    weights: Tensor | None = None
    sequences: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def labels(self) -> int:
        return len(self.targets)

    @property
    def has_branches(self) -> bool:
        """Whether something shares more than the prefix."""
        return any(len(front) > self.prefix for front in self.fronts)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments: chats and branches, then the prefix."""
        segments, start = [], self.prefix
        for length, front in zip(self.lengths, self.fronts, strict=True):
            segments.append(Segment(start, length, front))
            start += length
        if self.prefix:
            segments.append(Segment(0, self.prefix, torch.arange(0)))
        return tuple(segments)

    def to(self, device: torch.device, embedding: torch.device) -> PackedSequence:
        """Return the sequence on a device; `fronts`, from which layouts are made, stay on the host.

        Args:
            device: that computes.
            embedding: the device that has the embedding, to which the ids go.
        """
        return replace(
            self,
            ids=to_device(self.ids, embedding),
            positions=to_device(self.positions, device),
            label_positions=to_device(self.label_positions, device),
            targets=to_device(self.targets, device),
            weights=None if self.weights is None else to_device(self.weights, device),
        )

    def batch_shape(self, unpadded: bool) -> BatchShape:
        """Return the sizes by which memory is estimated; compiled attention and that of a GPU need no padding."""
        longest = max(segment.length for segment in self.segments)
        padded = not unpadded and not self.has_branches and longest <= LONG
        if not padded:
            longest = int(self.positions.max()) + 1
        fronts = torch.cat(self.fronts)
        shared = len(fronts) + len(set(fronts.tolist()))
        return BatchShape(len(self.ids), len(self.segments), longest, self.prefix, self.labels, padded, shared)


def token_budget(device: str) -> int:
    """Return how many tokens are computed at once on "cpu", "cuda" or "mps"."""
    return TOKEN_BUDGET if device == "cpu" else DEVICE_TOKEN_BUDGET


def pack(tokens: PreparedTokens, indices: Sequence[int], share: bool) -> PackedSequence:
    """Pack chats into one sequence.

    Args:
        tokens: all chats.
        indices: the chats to pack, in order. Each sequence ends before its last label: later tokens can't change the
            loss.
        share: compute a common prefix once. The result is the same, as attention is causal and no token predicts two
            labels; but with dropout, sequences would share the prefix's random mask.
    """
    chats = _branches(tokens, indices, share)
    chats = [chat for chat in chats if chat] or [_without_labels(tokens, indices[0])]
    prefix = _shared_prefix(chats) if share else 0
    if max(len(branch.ids) for chat in chats for branch in chat) - prefix > LONG:
        prefix = 0
    ids, positions = [chats[0][0].ids[:prefix]], [torch.arange(prefix)]
    lengths, fronts, label_positions = [], [], []
    start = prefix
    for chat in chats:
        path = torch.arange(prefix)  # the packed tokens of a branch, the shared ones included
        for branch in chat:
            front = path[: max(prefix, branch.shared)]
            length = len(branch.ids) - len(front)
            path = torch.cat([front, torch.arange(start, start + length)])
            label_positions.append(path[branch.label_positions])
            if length:
                ids.append(branch.ids[len(front) :])
                positions.append(torch.arange(len(front), len(branch.ids)))
                lengths.append(length)
                fronts.append(front)
                start += length
    sorted_positions, order = torch.cat(label_positions).sort()
    branches = [branch for chat in chats for branch in chat]
    return PackedSequence(
        ids=torch.cat(ids),
        positions=torch.cat(positions),
        prefix=prefix,
        lengths=tuple(lengths),
        fronts=tuple(fronts),
        label_positions=sorted_positions,
        targets=torch.cat([branch.targets for branch in branches])[order],
        weights=_weights(branches, order),
        sequences=torch.cat([torch.full_like(branch.targets, branch.number) for branch in branches])[order],
    )


def _weights(branches: Sequence[Branch], order: Tensor) -> Tensor | None:
    weights = [branch.weights for branch in branches if branch.weights is not None]
    return torch.cat(weights)[order] if weights else None


def _branches(tokens: PreparedTokens, indices: Sequence[int], share: bool) -> list[list[Branch]]:
    return [
        branches_of(
            [(*tokens.sequence(each), tokens.sequence_weights(each)) for each in tokens.sequences(index)],
            share,
            tokens.sequences(index).start,
        )
        for index in indices
    ]


def _without_labels(tokens: PreparedTokens, index: int) -> list[Branch]:
    """Return a chat from which nothing is learned."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return [Branch(tokens.sequence(tokens.sequences(index)[-1])[0], 0, nothing, nothing)]


def _shared_prefix(chats: Sequence[Sequence[Branch]]) -> int:
    """Return the length of the prefix that several chats share; no token in it predicts a label."""
    prefix = common_prefix(chats) if len(chats) > 1 else 0
    return prefix if prefix >= _SHORTEST_PREFIX else 0


def costs(tokens: PreparedTokens, indices: Sequence[int], share: bool, label: float) -> dict[int, float]:
    """Return the cost of each chat in tokens: those that are computed for it alone, and `label` for each logit."""
    chats = dict(zip(indices, _branches(tokens, indices, share), strict=True))
    prefix = _shared_prefix([chat for chat in chats.values() if chat]) if share else 0
    own = {index: sum(len(branch.ids) - max(prefix, branch.shared) for branch in chat) for index, chat in chats.items()}
    return {index: own[index] + label * tokens.label_count(index) for index in chats}


def group_by_length(
    tokens: PreparedTokens, indices: Sequence[int], share: bool, budget: int = TOKEN_BUDGET
) -> list[list[int]]:
    """Group chats of similar length, at most `budget` tokens a group; a longer chat has a separate group.

    Args:
        tokens: all chats.
        indices: the chats to group.
        share: whether a prefix that two sequences of a chat share counts once.
        budget: the most tokens.
    """
    lengths = {index: tokens.chat_length(index) if share else tokens.unshared_length(index) for index in indices}
    groups: list[list[int]] = []
    capacity = 0
    for index in sorted(indices, key=lambda each: (-lengths[each], each)):
        if not groups or lengths[index] > capacity:
            groups.append([])
            capacity = budget
        groups[-1].append(index)
        capacity -= lengths[index]
    return groups
