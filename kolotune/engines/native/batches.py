"""Prepared tokens as batches, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...errors import TrainingError

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """Chats as one flat row of tokens.

    Attributes:
        ids: int32 ``[tokens]``.
        labelled: bool ``[tokens]``: whether the loss counts this token.
        offsets: int64 ``[chats + 1]``: where each chat begins, and the end.
    """

    ids: Tensor
    labelled: Tensor
    offsets: Tensor

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """The tokens of a file that the prepare stage wrote.

        Raises:
            TrainingError: the file is damaged.
        """
        try:
            loaded = load_file(path)
            return cls(loaded["ids"], loaded["labelled"].bool(), loaded["offsets"])
        except (SafetensorError, KeyError, OSError) as error:
            raise TrainingError(f"{path}: can't be read: {error}", "Run `kolotune prepare` again.") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def chat(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels of one chat; both int64 ``[length]``, labels `IGNORED` where the loss doesn't count."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        ids = self.ids[span].long()
        return ids, torch.where(self.labelled[span], ids, IGNORED)


@dataclass(frozen=True)
class Batch:
    """Chats side by side, padded on the right.

    Attributes:
        ids: int64 ``[chats, length]``; what stands in the padding is never seen, attention being causal.
        targets: int64 ``[chats, positions]``: the token that each kept position has to predict, or `IGNORED`.
        positions: int64 ``[positions]``: where at least one chat has a label next.
        tokens: number of real tokens.
        labels: number of labelled tokens.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor
    tokens: int
    labels: int

    def to(self, device: str) -> Batch:
        return Batch(self.ids.to(device), self.targets.to(device), self.positions.to(device), self.tokens, self.labels)


def make_batch(tokens: Tokens, indices: list[int]) -> Batch:
    """The chats `indices` as one batch."""
    chats = [tokens.chat(index) for index in indices]
    longest = max(len(ids) for ids, _ in chats)
    ids = torch.zeros(len(chats), longest, dtype=torch.int64)
    labels = torch.full((len(chats), longest), IGNORED, dtype=torch.int64)
    for row, (chat_ids, chat_labels) in enumerate(chats):
        ids[row, : len(chat_ids)] = chat_ids
        labels[row, : len(chat_labels)] = chat_labels
    labels[:, 0] = IGNORED  # nothing stands before the first token that could predict it
    positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
    return Batch(
        ids=ids,
        targets=labels[:, positions],
        positions=positions - 1,
        tokens=sum(len(chat_ids) for chat_ids, _ in chats),
        labels=int((labels != IGNORED).sum()),
    )


def order_of(epoch: int, chats: int, seed: int) -> list[int]:
    """The order in which an epoch (from 0) goes through the chats."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(chats, generator=generator).tolist()
    return order


def steps_of(
    tokens: Tokens, epoch: int, seed: int, batch_size: int, accumulation: int, first: int = 0
) -> Iterator[list[Batch]]:
    """The steps of an epoch from step `first` of it on; each is a list of at most `accumulation` batches."""
    order = order_of(epoch, len(tokens), seed)
    size = batch_size * accumulation
    for start in range(first * size, len(order), size):
        step = order[start : start + size]
        yield [make_batch(tokens, step[at : at + batch_size]) for at in range(0, len(step), batch_size)]


def steps_in_epoch(chats: int, batch_size: int, accumulation: int) -> int:
    """The number of steps of an epoch; the last may be smaller than the others."""
    return -(-chats // (batch_size * accumulation))


def in_order(tokens: Tokens, batch_size: int) -> Iterator[Batch]:
    """All chats, longest first, for evaluation."""
    lengths = (tokens.offsets[1:] - tokens.offsets[:-1]).tolist()
    order = sorted(range(len(tokens)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), batch_size):
        yield make_batch(tokens, order[start : start + batch_size])
