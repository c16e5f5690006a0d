"""Prepared tokens as batches, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kolotune.foundation.errors import TrainingError

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """Chats as one flat row of tokens, mapped from their file: what is not looked at takes no memory.

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
            return cls(loaded["ids"], loaded["labelled"].view(torch.bool), loaded["offsets"])
        except (SafetensorError, KeyError, OSError) as error:
            raise TrainingError(f"{path}: can't be read: {error}", "Run `kolotune prepare` again.") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def chat(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels of one chat; both int64 ``[length]``, labels `IGNORED` where the loss doesn't count."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        ids = self.ids[span].long()
        return ids, torch.where(self.labelled[span], ids, IGNORED)

    @property
    def longest(self) -> int:
        """Tokens of the longest chat; 0 when there is none."""
        return int((self.offsets[1:] - self.offsets[:-1]).max()) if len(self) else 0

    def length_of(self, index: int) -> int:
        """Tokens of one chat."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def labels_of(self, index: int) -> int:
        """Labelled tokens of one chat; on its first one nothing could predict a label, and it doesn't count."""
        return int(self.labelled[int(self.offsets[index]) + 1 : int(self.offsets[index + 1])].sum())


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
    order: list[int] = _shuffled(epoch, chats, seed).tolist()
    return order


def _shuffled(epoch: int, chats: int, seed: int) -> Tensor:
    return torch.randperm(chats, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def steps_of(chats: int, epoch: int, seed: int, size: int, first: int = 0) -> Iterator[list[int]]:
    """The chats of each step of an epoch, from step `first` of it on; at most `size` of them in a step."""
    order = _shuffled(epoch, chats, seed)  # no list of it: that would be 36 MB for a million chats
    for start in range(first * size, len(order), size):
        yield order[start : start + size].tolist()


def steps_in_epoch(chats: int, batch_size: int, accumulation: int) -> int:
    """The number of steps of an epoch; the last may be smaller than the others."""
    return -(-chats // (batch_size * accumulation))


def longest_first(tokens: Tokens) -> list[int]:
    """All chats, longest first, for evaluation."""
    lengths = tokens.offsets[1:] - tokens.offsets[:-1]
    order: list[int] = lengths.argsort(descending=True, stable=True).tolist()
    return order
