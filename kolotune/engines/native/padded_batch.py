"""Sequences side by side as one padded batch, for models that transformers computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prepared_tokens import IGNORED, PreparedTokens


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences side by side, padded on the right.

    Attributes:
        ids: int64 ``[sequences, length]``; attention is causal, so nothing reads the padding.
        targets: int64 ``[sequences, positions]``: the token to predict at each kept position, or `IGNORED`.
        positions: int64 ``[positions]``: positions at which at least one sequence has a label next.
        tokens: number of tokens without padding.
        labels: number of labels.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    tokens: int
    labels: int

    def to(self, device: str) -> PaddedBatch:
        return PaddedBatch(
            self.ids.to(device), self.targets.to(device), self.positions.to(device), self.tokens, self.labels
        )


def pad_batch(tokens: PreparedTokens, numbers: Sequence[int]) -> PaddedBatch:
    """Pad the sequences `numbers` to one length."""
    sequences = [tokens.sequence(number) for number in numbers]
    longest = max(len(ids) for ids, _ in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    labels = torch.full((len(sequences), longest), IGNORED, dtype=torch.int64)
    for row, (own_ids, own_labels) in enumerate(sequences):
        ids[row, : len(own_ids)] = own_ids
        labels[row, : len(own_labels)] = own_labels
    labels[:, 0] = IGNORED  # no token precedes the first one that could predict it
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    return PaddedBatch(
        ids=ids,
        targets=labels[:, positions],
        positions=positions - 1,
        tokens=sum(len(own_ids) for own_ids, _ in sequences),
        labels=int((labels != IGNORED).sum()),
    )
