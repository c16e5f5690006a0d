"""A chat as token ids and labels.

Most chats are one sequence. Where the prompts that a model is served with are not the beginnings of the whole chat,
each answer is a sequence of its own: its prompt and the answer.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..templates.loss_mask import ApartReason


@dataclass(frozen=True)
class EncodedChat:
    """A chat as tokens.

    Attributes:
        packed_ids: The token ids of all sequences, end to end, as int32 in memory.
        packed_labels: For each token a byte: whether the loss falls on it.
        special_in_content: A content contains the text of a special token, which was encoded as plain text.
        ends: Where each sequence ends in the ids; empty if there is only one.
        apart: Why there are several sequences.
        masked_thoughts: The number of empty thoughts that the loss does not fall on.
        dropped_thoughts: The number of thoughts that later prompts don't have, since the template leaves them out.
        packed_weights: For each token how much the loss on it counts, as fp32 in memory; empty where each label counts
            in full.
        rejected: How many of the sequences, the first ones, are of a rejected or undesirable answer.
    """

    packed_ids: bytes
    packed_labels: bytes
    special_in_content: bool = False
    ends: tuple[int, ...] = ()
    apart: ApartReason | None = None
    masked_thoughts: int = 0
    dropped_thoughts: int = 0
    packed_weights: bytes = b""
    rejected: int = 0

    def __len__(self) -> int:
        return len(self.packed_labels)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence."""
        return [end - start for start, end in pairwise((0, *self.ends))] if self.ends else [len(self)]

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return array("i", self.packed_ids).tolist()

    @property
    def labelled(self) -> list[bool]:
        """For each id, whether the loss falls on it."""
        return [bool(label) for label in self.packed_labels]


def packed_weights(labels: bytes | bytearray, spans: Sequence[tuple[int, int, float]]) -> bytes:
    """Return the weight of each token as fp32 in memory; empty without spans.

    Args:
        labels: A byte for each token: whether the loss falls on it.
        spans: Labels that count less: where each span starts and ends, and its weight.
    """
    if not spans:
        return b""
    weights = array("f", list(labels))
    for start, stop, weight in spans:
        weights[start:stop] = array("f", [weight if label else 0.0 for label in labels[start:stop]])
    return weights.tobytes()


def packed(ids: Sequence[int]) -> bytes:
    """Return token ids as int32 in memory."""
    return array("i", ids).tobytes()
