"""The answers of prepared preferences: whose log-probability each label belongs to, and KTO's mismatched answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kolotune.foundation.errors import TrainingError

from ..prepared_tokens import PreparedTokens
from .preference_losses import PREFERRED, REJECTED


@dataclass(frozen=True)
class AnswerTable:
    """The answers of all chats of a file.

    Attributes:
        tokens: the chats.
        sides: int64 ``[sequences]``: `PREFERRED` or `REJECTED`.
        labels: int64 ``[chats, 2]``: the labels of each answer; 0 where there is none.
    """

    tokens: PreparedTokens
    sides: Tensor
    labels: Tensor

    @classmethod
    def of(cls, tokens: PreparedTokens, *, pairs: bool) -> AnswerTable:
        """Count the answers.

        Args:
            tokens: the chats.
            pairs: whether each chat has to be a pair.

        Raises:
            TrainingError: a chat is no pair.
        """
        sides = torch.full([len(tokens.offsets) - 1], PREFERRED)
        labels = torch.zeros(len(tokens), 2, dtype=torch.int64)
        for chat in range(len(tokens)):
            numbers = tokens.sequences(chat)
            rejected = 0 if tokens.rejected is None else int(tokens.rejected[chat])
            sides[numbers[0] : numbers[0] + rejected] = REJECTED
            for number in numbers:
                labels[chat, sides[number]] += tokens.sequence_label_count(number)
        if pairs and not bool((labels > 0).all()):
            raise TrainingError(
                "the prepared chats are no pairs of answers", "Run `kolotune prepare` again with this --objective."
            )
        return cls(tokens, sides, labels)

    def sum(self, losses: Tensor, sequences: Tensor, chats: Sequence[int]) -> Tensor:
        """Return the summed log-probabilities of the answers of some chats, fp64 ``[chats, 2]``.

        Args:
            losses: fp32 ``[labels]``: the cross-entropy of each label.
            sequences: int64 ``[labels]``: the sequence that each belongs to.
            chats: in the order of the result.
        """
        logs = torch.zeros(2 * len(chats), dtype=torch.float64)
        return logs.index_add_(0, self.places(sequences, chats), -losses.double()).view(-1, 2)

    def places(self, sequences: Tensor, chats: Sequence[int]) -> Tensor:
        """Return where in a flat ``[chats, 2]`` the answer of each label is, int64 ``[labels]``."""
        rows = torch.zeros(len(self.sides), dtype=torch.int64)
        for row, chat in enumerate(chats):
            numbers = self.tokens.sequences(chat)
            rows[numbers.start : numbers.stop] = row
        return 2 * rows[sequences] + self.sides[sequences]


def mismatched(tokens: PreparedTokens, longest: int) -> PreparedTokens:
    """Return each chat's prompt with the answer of the next chat, whose log-probabilities estimate KTO's divergence.

    As in TRL, the pairs are the same in every epoch, so that the reference computes them once. A chat with several
    sequences has its last one here.

    Args:
        tokens: the chats.
        longest: tokens of the longest sequence; longer ones lose the end of the answer.
    """
    spans = [_prompt_and_answer(tokens, tokens.sequences(chat)[-1]) for chat in range(len(tokens))]
    ids, labelled, offsets = [], [], [0]
    for number, (start, first, _) in enumerate(spans):
        _, answer, end = spans[(number + 1) % len(spans)]
        end = min(end, answer + max(1, longest - (first - start)))
        ids += [tokens.ids[start:first], tokens.ids[answer:end]]
        labelled += [torch.zeros(first - start, dtype=torch.bool), tokens.labelled[answer:end]]
        offsets.append(offsets[-1] + first - start + end - answer)
    return PreparedTokens(torch.cat(ids), torch.cat(labelled), torch.tensor(offsets))


def _prompt_and_answer(tokens: PreparedTokens, number: int) -> tuple[int, int, int]:
    """Return where a sequence starts, where its first label is, and where it ends."""
    start, end = int(tokens.offsets[number]), int(tokens.offsets[number + 1])
    return start, start + int(tokens.labelled[start:end].nonzero()[0]), end
