"""The tokens that prepare wrote: reading them, and the order in which a training goes through the chats."""

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
"""The label of a token that the loss does not count."""


@dataclass(frozen=True)
class PreparedTokens:
    """All chats end to end as one array of tokens, mapped from the file: parts that nobody reads take no memory.

    Attributes:
        ids: int32 ``[tokens]``.
        labelled: bool ``[tokens]``: the loss mask, True where the loss counts the token.
        offsets: int64 ``[chats + 1]``: the start of each chat, and the end of the last.
    """

    ids: Tensor
    labelled: Tensor
    offsets: Tensor

    @classmethod
    def load(cls, path: Path) -> PreparedTokens:
        """Map a file that the prepare stage wrote.

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
        """Return ids and labels of one chat, int64 ``[length]``; labels are `IGNORED` where the loss does not count."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        ids = self.ids[span].long()
        return ids, torch.where(self.labelled[span], ids, IGNORED)

    @property
    def longest(self) -> int:
        """Tokens of the longest chat; 0 when there is none."""
        return int((self.offsets[1:] - self.offsets[:-1]).max()) if len(self) else 0

    def chat_length(self, index: int) -> int:
        """Count the tokens of one chat."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def label_count(self, index: int) -> int:
        """Count the labels of one chat, without its first token, which nothing could predict."""
        return int(self.labelled[int(self.offsets[index]) + 1 : int(self.offsets[index + 1])].sum())


def epoch_order(epoch: int, chats: int, seed: int) -> list[int]:
    """Return the order of the chats in an epoch, counted from 0; it depends on the seed and the epoch alone."""
    order: list[int] = _shuffled(epoch, chats, seed).tolist()
    return order


def _shuffled(epoch: int, chats: int, seed: int) -> Tensor:
    return torch.randperm(chats, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def epoch_steps(chats: int, epoch: int, seed: int, size: int, first: int = 0) -> Iterator[list[int]]:
    """Yield the chats of each step of an epoch, from step `first` on; at most `size` chats a step."""
    order = _shuffled(epoch, chats, seed)  # stays a tensor: a list of a million chats would take 36 MB
    for start in range(first * size, len(order), size):
        yield order[start : start + size].tolist()


def longest_first(tokens: PreparedTokens) -> list[int]:
    """Return all chats, longest first: the order of an evaluation."""
    lengths = tokens.offsets[1:] - tokens.offsets[:-1]
    order: list[int] = lengths.argsort(descending=True, stable=True).tolist()
    return order
