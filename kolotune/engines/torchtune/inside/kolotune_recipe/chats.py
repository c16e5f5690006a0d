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

    A batch may come in parts: where memory ran out, they are halves of it, and before that one whole and nothing. So a
    step has the same chats as ever.

    Args:
        chats: what is trained on.
        batch_size: chats of a batch.
        accumulation: batches of a step.
        seed: decides, with the epoch, the order.
        halvings: the steps from which on a part has half as many chats as before.
        parts: of each batch; those that are not needed hold no label.
    """

    def __init__(
        self, chats: Chats, batch_size: int, accumulation: int, seed: int, halvings: Sequence[int] = (), parts: int = 1
    ) -> None:
        self._chats, self._batch_size, self._accumulation, self._seed = chats, batch_size, accumulation, seed
        self._halvings, self._parts = halvings, parts
        self._epoch = 0
        self.sampler = self  # the recipe says `dataloader.sampler.set_epoch(n)`
        self.tokens_read = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is number `epoch`, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps() * self._accumulation * self._parts

    def _steps(self) -> int:
        return -(-len(self._chats) // (self._batch_size * self._accumulation))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._chats), generator=generator).tolist()
        for number in range(self._steps() * self._accumulation):
            indices = order[number * self._batch_size : (number + 1) * self._batch_size]
            self.tokens_read += sum(self._chats.length(index) for index in indices)
            size = at_once(self._batch_size, self._halvings, self._epoch * self._steps() + number // self._accumulation)
            for start in range(0, size * self._parts, size):
                part = indices[start : start + size]
                yield self._chats.batch(part) if part else _filler()


def _filler() -> dict[str, Tensor]:
    return {"tokens": torch.full((1, 1), PadId.pad_id), "labels": torch.full((1, 1), IGNORED)}


def at_once(batch_size: int, halvings: Sequence[int], step: int) -> int:
    """The chats that are computed at once at a step."""
    return max(1, batch_size >> sum(first <= step for first in halvings))


def in_order(chats: Chats, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All chats, longest first, for evaluation."""
    order = sorted(range(len(chats)), key=lambda index: (-chats.length(index), index))
    for start in range(0, len(order), batch_size):
        yield chats.batch(order[start : start + batch_size])
