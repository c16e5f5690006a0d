"""Sequences side by side as one padded batch, for models that transformers computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        lengths: int64 ``[sequences]``: the tokens of each up to its last label; 1 where it has none.
        weights: fp32 ``[sequences, positions]``: how much the loss on each target counts; None: in full.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    tokens: int
    labels: int
    lengths: Tensor
    weights: Tensor | None = None

    def to(self, device: str) -> PaddedBatch:
        return replace(
            self,
            ids=self.ids.to(device),
            targets=self.targets.to(device),
            positions=self.positions.to(device),
            weights=None if self.weights is None else self.weights.to(device),
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
        lengths=((labels != IGNORED) * torch.arange(longest)).amax(1) + 1,
        weights=_padded_weights(tokens, numbers, longest, positions),
    )


def _padded_weights(tokens: PreparedTokens, numbers: Sequence[int], longest: int, positions: Tensor) -> Tensor | None:
    if tokens.weights is None:
        return None
    weights = torch.zeros(len(numbers), longest)
    for row, number in enumerate(numbers):
        own = tokens.sequence_weights(number)
        assert own is not None
        weights[row, : len(own)] = own
    return weights[:, positions]
