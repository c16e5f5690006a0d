"""What is computed of one chat: a trunk, and a branch for each sequence that leaves another one.

The trunk is the chat's last sequence. Each earlier one, from the last to the first, is a branch of the one behind it:
it shares the tokens with which both begin, and only the others are computed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..prepared_tokens import IGNORED

LabelledSequence: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Ids and labels of a sequence, and how much the loss on each label counts; None: in full."""


@dataclass(frozen=True)
class Branch:
    """One sequence up to its last label: later tokens can't change the loss.

    Attributes:
        ids: int64 ``[length]``, the shared ones included.
        shared: tokens from the start that are those of the branch (or trunk) before.
        label_positions: int64 ``[labels]``: indices into `ids` of tokens whose next token is a label.
        targets: int64 ``[labels]``: that next token.
        weights: fp32 ``[labels]``: how much the loss on it counts; None: in full.
        number: of the sequence.
    """

    ids: Tensor
    shared: int
    label_positions: Tensor
    targets: Tensor
    weights: Tensor | None = None
    number: int = 0


def branches_of(sequences: Iterable[LabelledSequence], share: bool, first: int = 0) -> list[Branch]:
    """Return the trunk of a chat and then its branches; sequences without labels are left out.

    No token predicts two labels: where a sequence and the one that it shares with both have one, sharing ends.

    Args:
        sequences: ids, labels and weights of each, in the order of the chat's answers.
        share: whether branches share anything.
        first: number of the first sequence.
    """
    branches: list[Branch] = []
    predicts = torch.zeros(0, dtype=torch.bool)  # of each token of the branch before: whether its next one is a label
    for number, (ids, labels, weights) in reversed(list(enumerate(sequences, first))):
        positions = (labels[1:] != IGNORED).nonzero().squeeze(1)
        if not len(positions):
            continue
        ids = ids[: int(positions[-1]) + 1]
        shared = _common_prefix(ids, branches[-1].ids) if share and branches else 0
        both = positions[positions < shared]
        both = both[predicts[both]]
        if len(both):
            shared = int(both[0])
        predicts = torch.cat([predicts[:shared], torch.zeros(len(ids) - shared, dtype=torch.bool)])
        predicts[positions] = True
        own = None if weights is None else weights[positions + 1]
        branches.append(Branch(ids, shared, positions, labels[positions + 1], own, number))
    return branches


def common_prefix(chats: Sequence[Sequence[Branch]]) -> int:
    """Return the length of the prefix that all sequences of several chats share; no token in it predicts a label."""
    everything = [branch for chat in chats for branch in chat]
    first, limit = everything[0].ids, len(everything[0].ids)
    for branch in everything:
        limit = min(limit, int(branch.label_positions[0]))
    for branch in everything[1:]:
        limit = _common_prefix(first[:limit], branch.ids)
    return limit


def _common_prefix(left: Tensor, right: Tensor) -> int:
    length = min(len(left), len(right))
    differing = (left[:length] != right[:length]).nonzero()
    return int(differing[0]) if len(differing) else length
