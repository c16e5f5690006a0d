"""Chats side by side as one padded batch, for models that transformers computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..prepared_tokens import IGNORED, PreparedTokens


@dataclass(frozen=True)
class PaddedBatch:
    """Chats side by side, padded on the right.

    Attributes:
        ids: int64 ``[chats, length]``; attention is causal, so nothing reads the padding.
        targets: int64 ``[chats, positions]``: the token to predict at each kept position, or `IGNORED`.
        positions: int64 ``[positions]``: positions at which at least one chat has a label next.
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


def pad_batch(tokens: PreparedTokens, indices: list[int]) -> PaddedBatch:
    """Pad the chats `indices` to one length."""
    chats = [tokens.chat(index) for index in indices]
    longest = max(len(ids) for ids, _ in chats)
    ids = torch.zeros(len(chats), longest, dtype=torch.int64)
    labels = torch.full((len(chats), longest), IGNORED, dtype=torch.int64)
    for row, (chat_ids, chat_labels) in enumerate(chats):
        ids[row, : len(chat_ids)] = chat_ids
        labels[row, : len(chat_labels)] = chat_labels
    labels[:, 0] = IGNORED  # no token precedes the first one that could predict it
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    return PaddedBatch(
        ids=ids,
        targets=labels[:, positions],
        positions=positions - 1,
        tokens=sum(len(chat_ids) for chat_ids, _ in chats),
        labels=int((labels != IGNORED).sum()),
    )
