"""The tokens that prepare wrote: reading them, and the order in which a training goes through the chats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kolotune.foundation.errors import TrainingError

from .chat_sequences import chat_lengths

IGNORED = -100
"""The label of a token that the loss does not count."""


@dataclass(frozen=True)
class PreparedTokens:
    """All chats end to end as one array of tokens, mapped from the file: parts that nobody reads take no memory.

    A chat is one sequence, or several where each answer is a sequence of its own behind the prompt that it is served
    with.

    Attributes:
        ids: int32 ``[tokens]``.
        labelled: bool ``[tokens]``: the loss mask, True where the loss counts the token.
        offsets: int64 ``[sequences + 1]``: the start of each sequence, and the end of the last.
        chats: int64 ``[chats + 1]``: the first sequence of each chat, and the number of sequences; None where each
            sequence is a chat.
        weights: fp32 ``[tokens]``: how much the loss on each label counts; None where each counts in full.
        rejected: int64 ``[chats]``: how many of each chat's sequences, the first ones, are of a rejected answer; None
            where no chat has one.
    """

    ids: Tensor
    labelled: Tensor
    offsets: Tensor
    chats: Tensor | None = None
    weights: Tensor | None = None
    rejected: Tensor | None = None

    @classmethod
    def load(cls, path: Path) -> PreparedTokens:
        """Map a file that the prepare stage wrote.

        Raises:
            TrainingError: the file is damaged.
        """
        try:
            loaded = load_file(path)
            optional = {name: loaded.get(name) for name in ("chats", "weights", "rejected")}
            return cls(loaded["ids"], loaded["labelled"].view(torch.bool), loaded["offsets"], **optional)
        except (SafetensorError, KeyError, OSError) as error:
            raise TrainingError(f"{path}: can't be read: {error}", "Run `kolotune prepare` again.") from None

    def __len__(self) -> int:
        return len(self.offsets if self.chats is None else self.chats) - 1

    def sequences(self, chat: int) -> range:
        """Return the numbers of a chat's sequences, in the order of its answers."""
        return range(chat, chat + 1) if self.chats is None else range(int(self.chats[chat]), int(self.chats[chat + 1]))

    def sequence(self, number: int) -> tuple[Tensor, Tensor]:
        """Return ids and labels of a sequence, int64 ``[length]``; a token that the loss skips has label `IGNORED`."""
        span = self._span(number)
        ids = self.ids[span].long()
        return ids, torch.where(self.labelled[span], ids, IGNORED)

    def sequence_weights(self, number: int) -> Tensor | None:
        """Return how much the loss on each token of a sequence counts, fp32 ``[length]``; None: each label in full."""
        return None if self.weights is None else self.weights[self._span(number)]

    def sequence_length(self, number: int) -> int:
        """Count the tokens of one sequence."""
        return int(self.offsets[number + 1] - self.offsets[number])

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 when there is none."""
        return int((self.offsets[1:] - self.offsets[:-1]).max()) if len(self) else 0

    def chat_length(self, chat: int) -> int:
        """Count the tokens of one chat; a prefix that a sequence shares with the next one counts once."""
        numbers = self.sequences(chat)
        if len(numbers) == 1:
            return self.sequence_length(numbers[0])
        offsets = self.offsets[numbers[0] : numbers[-1] + 2].numpy()
        return int(chat_lengths(self.ids.numpy(), self.labelled.numpy(), offsets, np.array([0, len(numbers)]))[0])

    def unshared_length(self, chat: int) -> int:
        """Count the tokens of one chat's sequences, each by itself."""
        return sum(map(self.sequence_length, self.sequences(chat)))

    def chat_lengths(self) -> Tensor:
        """Count the tokens of all chats, int64 ``[chats]``, as `chat_length` does."""
        if self.chats is None:
            return self.offsets[1:] - self.offsets[:-1]
        ids, labelled = self.ids.numpy(), self.labelled.numpy()
        return torch.from_numpy(chat_lengths(ids, labelled, self.offsets.numpy(), self.chats.numpy()))

    def label_count(self, chat: int) -> int:
        """Count the labels of one chat, without the first token of a sequence, which nothing could predict."""
        return sum(map(self.sequence_label_count, self.sequences(chat)))

    def sequence_label_count(self, number: int) -> int:
        """Count the labels of one sequence, without its first token."""
        return int(self.labelled[self._span(number)][1:].sum())

    def preferred_sequences(self, chat: int) -> range:
        """Return the numbers of a chat's sequences without those of a rejected answer; all if there is no other."""
        numbers = self.sequences(chat)
        rejected = 0 if self.rejected is None else int(self.rejected[chat])
        return numbers if rejected == len(numbers) else numbers[rejected:]

    def label_weight(self, chat: int) -> float:
        """Add up how much the labels that `label_count` counts count in the loss."""
        if self.weights is None:
            return self.label_count(chat)
        return sum(float(self.weights[self._span(number)][1:].double().sum()) for number in self.sequences(chat))

    def _span(self, number: int) -> slice:
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))


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
    order: list[int] = tokens.chat_lengths().argsort(descending=True, stable=True).tolist()
    return order
