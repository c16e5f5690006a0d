"""Prepared tokens as torchtune's recipe reads them: the same ids, labels and order as in the native engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

IGNORED = -100


class PadId:
    """All that the recipe asks a tokenizer for; the chats are encoded already."""

    pad_id = 0  # what stands in the padding is never seen: attention is causal, and labels there are ignored


@dataclass(frozen=True)
class Chats:
    """Chats as one flat row of tokens, mapped from their file: ids and flags ``[tokens]``, offsets ``[chats + 1]``."""

    ids: Tensor
    labelled: Tensor
    offsets: Tensor

    @classmethod
    def load(cls, path: Path) -> Chats:
        """The chats of a file that kolotune prepared."""
        loaded = load_file(path)
        return cls(loaded["ids"], loaded["labelled"].view(torch.bool), loaded["offsets"])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def length(self, index: int) -> int:
        """Tokens of chat `index`."""
        return int(self.offsets[index + 1] - self.offsets[index])

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        """Chats side by side, padded on the right: ``tokens`` and ``labels``, int64 ``[chats, longest]``."""
        longest = max(self.length(index) for index in indices)
        tokens = torch.full((len(indices), longest), PadId.pad_id)
        labels = torch.full((len(indices), longest), IGNORED)
        for row, index in enumerate(indices):
            span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
            tokens[row, : self.length(index)] = self.ids[span]
            labels[row, : self.length(index)] = torch.where(self.labelled[span], self.ids[span].long(), IGNORED)
        labels[:, 0] = IGNORED  # nothing stands before the first token that could predict it
        return {"tokens": tokens, "labels": labels}


class Loader:
    """The recipe's dataloader, in which no chat is ever dropped.

    torchtune's own drops the last batch when it is not full, and its loop drops the last batches when they don't
    make a whole step. Here the last batch may be smaller, and a step that lacks batches is filled up with ones
    that hold a single token and no label: they add nothing to the loss, which is a mean over labels.

    Where memory ran out, a batch comes in parts; where several processes train, each has its share of a step's chats,
    in batches of its own. So a step has the same chats as ever.

    Args:
        chats: what is trained on.
        batch_size: chats of a batch.
        accumulation: batches of a step.
        seed: decides, with the epoch, the order.
        halvings: the steps from which on a batch has half as many chats as before.
        rank, size: this process's number among those that train together, from 0, and how many there are.
    """

    def __init__(
        self,
        chats: Chats,
        batch_size: int,
        accumulation: int,
        seed: int,
        halvings: Sequence[int] = (),
        rank: int = 0,
        size: int = 1,
    ) -> None:
        self._chats, self._batch_size, self._seed, self._halvings = chats, batch_size, seed, halvings
        self._rank, self._size = rank, size
        self._chats_of_step = batch_size * accumulation
        self._batches = batches_of_step(batch_size, accumulation, halvings, size)
        self._epoch = 0
        self.sampler = self  # the recipe says `dataloader.sampler.set_epoch(n)`
        self.tokens_read = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number `epoch`, from 0."""
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
            batches = self._batches_of(indices, at_once(self._batch_size, self._halvings, self._of_all(number)))
            yield from (self._chats.batch(each) for each in batches)
            yield from (_filler() for _ in range(self._batches - len(batches)))

    def _of_all(self, number: int) -> int:
        """The number of a step of this epoch among all steps."""
        return self._epoch * self._steps() + number

    def _batches_of(self, indices: list[int], size: int) -> list[list[int]]:
        """This process's batches of a step, of at most `size` chats."""
        if self._size > 1:
            return _cut(share(self._chats, indices, self._rank, self._size), size)
        return [part for batch in _cut(indices, self._batch_size) for part in _cut(batch, size)]


def batches_of_step(batch_size: int, accumulation: int, halvings: Sequence[int], size: int = 1) -> int:
    """The batches of a step in each of `size` processes: as many as when they were halved for the last time."""
    smallest = max(1, batch_size >> len(halvings))
    if size == 1:
        return accumulation * -(-batch_size // smallest)
    return -(-batch_size * accumulation // (size * smallest))


def share(chats: Chats, indices: Sequence[int], rank: int, size: int) -> list[int]:
    """This process's part of the chats `indices`: as many as others have, or one more, and about as many tokens.

    Longest first; dealt to and fro, so that nobody always gets the longest.
    """
    order = sorted(indices, key=lambda index: (-chats.length(index), index))
    turns = [*range(size), *reversed(range(size))]
    return [index for place, index in enumerate(order) if turns[place % len(turns)] == rank]


def at_once(batch_size: int, halvings: Sequence[int], step: int) -> int:
    """The chats that are computed at once at a step."""
    return max(1, batch_size >> sum(first <= step for first in halvings))


def in_order(chats: Chats, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[dict[str, Tensor]]:
    """This process's part of all chats, longest first, for evaluation; with fillers where others have a batch more."""
    batches = _cut(share(chats, range(len(chats)), rank, size), batch_size)
    most = -(-len(chats) // (size * batch_size))
    yield from (chats.batch(each) for each in batches)
    yield from (_filler() for _ in range(most - len(batches)))


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _filler() -> dict[str, Tensor]:
    return {"tokens": torch.full((1, 1), PadId.pad_id), "labels": torch.full((1, 1), IGNORED)}
