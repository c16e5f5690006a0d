"""Prepared tokens as torchtune's recipe reads them: the same ids, labels and order as in kolotune's own engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

IGNORED = -100


class PadId:
    """All that the recipe needs of a tokenizer; the chats are encoded already."""

    pad_id = 0  # nothing reads the padding: attention is causal, and its labels are ignored


@dataclass(frozen=True)
class TokenizedChats:
    """All chats end to end, mapped from their file; a chat is one sequence or several.

    Attributes:
        ids, labelled: ids and loss mask, ``[tokens]``.
        offsets: the start of each sequence, and the end of the last, ``[sequences + 1]``.
        chats: the first sequence of each chat, and the number of sequences, ``[chats + 1]``.
    """

    ids: Tensor
    labelled: Tensor
    offsets: Tensor
    chats: Tensor

    @classmethod
    def load(cls, path: Path) -> TokenizedChats:
        """Map a file that kolotune prepared; without ``chats`` each sequence is a chat."""
        loaded = load_file(path)
        chats = loaded["chats"] if "chats" in loaded else torch.arange(len(loaded["offsets"]))
        return cls(loaded["ids"], loaded["labelled"].view(torch.bool), loaded["offsets"], chats)

    def __len__(self) -> int:
        return len(self.chats) - 1

    def _spans(self, index: int) -> list[slice]:
        """Return where the sequences of a chat are."""
        first, last = int(self.chats[index]), int(self.chats[index + 1])
        bounds = self.offsets[first : last + 1].tolist()
        return [slice(start, end) for start, end in pairwise(bounds)]

    def cost(self, index: int) -> int:
        """Return how many tokens are computed for a chat, without padding."""
        return sum(span.stop - span.start for span in self._spans(index))

    def length(self, index: int) -> int:
        """Return the tokens of a chat; a prefix that a sequence shares with the next one counts once."""
        sequences = [self.ids[span] for span in self._spans(index)]
        return self.cost(index) - sum(map(_common_prefix, sequences, sequences[1:]))

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Return the sequences of chats side by side, padded on the right.

        Returns:
            ``tokens`` and ``labels``, int64 ``[sequences, longest]``.
        """
        spans = [span for index in indices for span in self._spans(index)]
        longest = max(span.stop - span.start for span in spans)
        tokens = torch.full((len(spans), longest), PadId.pad_id)
        labels = torch.full((len(spans), longest), IGNORED)
        for row, span in enumerate(spans):
            length = span.stop - span.start
            tokens[row, :length] = self.ids[span]
            labels[row, :length] = torch.where(self.labelled[span], self.ids[span].long(), IGNORED)
        labels[:, 0] = IGNORED  # no token precedes the first one that could predict it
        return {"tokens": tokens, "labels": labels}


class Loader:
    """The recipe's dataloader, which drops no chat.

    torchtune's own drops the last batch if it is not full, and its loop drops the last batches if they don't make a
    whole step. Here the last batch may be smaller, and a step that lacks batches gets fillers of a single token
    without a label. They add nothing to the loss, which is a mean over labels.

    Where memory ran out, a batch is split. Where several processes train, each has a share of a step's chats, in
    separate batches. A step always has the same chats.

    Args:
        chats: what is trained on.
        batch_size: chats of a batch.
        accumulation: batches of a step.
        seed: decides, with the epoch, the order.
        backoff_steps: steps from which on a batch has half as many chats as before.
        rank, size: this process's number, from 0, and the number of processes.
    """

    def __init__(
        self,
        chats: TokenizedChats,
        batch_size: int,
        accumulation: int,
        seed: int,
        backoff_steps: Sequence[int] = (),
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._chats, self._batch_size, self._seed, self._backoff_steps = chats, batch_size, seed, backoff_steps
        self._rank, self._size = rank, size
        self._chats_of_step = batch_size * accumulation
        self._batches = batches_of_step(batch_size, accumulation, backoff_steps, size)
        self._epoch = 0
        self.sampler = self  # the recipe calls `dataloader.sampler.set_epoch(n)`
        self.tokens_read = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the next epoch, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps() * self._batches

    def _steps(self) -> int:
        return -(-len(self._chats) // self._chats_of_step)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._chats), generator=generator).tolist()
        for number in range(self._steps()):
            indices = order[number * self._chats_of_step : (number + 1) * self._chats_of_step]
            self.tokens_read += sum(self._chats.length(index) for index in indices)
            batches = self._batches_of(
                indices, micro_batch_size(self._batch_size, self._backoff_steps, self._global_step(number))
            )
            yield from (self._chats.batch(each) for each in batches)
            yield from (_filler() for _ in range(self._batches - len(batches)))

    def _global_step(self, number: int) -> int:
        """Return the number of a step of this epoch among all steps."""
        return self._epoch * self._steps() + number

    def _batches_of(self, indices: list[int], size: int) -> list[list[int]]:
        """Return this process's batches of a step, of at most `size` chats."""
        if self._size > 1:
            return _cut(share(self._chats, indices, self._rank, self._size), size)
        return [part for batch in _cut(indices, self._batch_size) for part in _cut(batch, size)]


def batches_of_step(batch_size: int, accumulation: int, backoff_steps: Sequence[int], size: int = 1) -> int:
    """Return the number of batches of a step in each of `size` processes, at the smallest size of a batch."""
    smallest = max(1, batch_size >> len(backoff_steps))
    if size == 1:
        return accumulation * -(-batch_size // smallest)
    return -(-batch_size * accumulation // (size * smallest))


def share(chats: TokenizedChats, indices: Sequence[int], rank: int, size: int) -> list[int]:
    """Return this process's share of the chats `indices`: equal numbers of chats and about equal numbers of tokens.

    The longest comes first. Ranks take turns forwards, then backwards, so that no rank always gets the longest.
    """
    order = sorted(indices, key=lambda index: (-chats.cost(index), index))
    turns = [*range(size), *reversed(range(size))]
    return [index for position, index in enumerate(order) if turns[position % len(turns)] == rank]


def micro_batch_size(batch_size: int, backoff_steps: Sequence[int], step: int) -> int:
    """Return how many chats are computed at once at a step."""
    return max(1, batch_size >> sum(first <= step for first in backoff_steps))


def evaluation_batches(
    chats: TokenizedChats, batch_size: int, rank: int = 0, size: int = 1
) -> Iterator[dict[str, Tensor]]:
    """Yield this process's share of all chats, longest first, with a filler where other processes have a batch more."""
    batches = _cut(share(chats, range(len(chats)), rank, size), batch_size)
    most = -(-len(chats) // (size * batch_size))
    yield from (chats.batch(each) for each in batches)
    yield from (_filler() for _ in range(most - len(batches)))


def _common_prefix(left: Tensor, right: Tensor) -> int:
    """Return how many tokens two sequences have in common, from the first on."""
    length = min(len(left), len(right))
    differing = (left[:length] != right[:length]).nonzero()
    return int(differing[0]) if len(differing) else length


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _filler() -> dict[str, Tensor]:
    return {"tokens": torch.full((1, 1), PadId.pad_id), "labels": torch.full((1, 1), IGNORED)}
