"""Whether a model's vocabulary is in the order of the trained tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .defects import Defect, DefectKind, defect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocabulary_by_id(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Return the vocabulary by token id.

    Added tokens that are not special are None: file formats write them differently.
    """
    vocabulary = tokenizer.get_vocab()
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if not token.special}
    pieces: list[str | None] = [None] * (max(vocabulary.values()) + 1)
    for piece, index in vocabulary.items():
        if index not in added:
            pieces[index] = piece
    return pieces


def moved_entry(expected: Sequence[str | None], actual: Sequence[str]) -> Defect | None:
    """Return a defect for the first entry that has another id than in training, or None.

    An entry that is only spelled differently (SentencePiece's space, for example) does not count.
    """
    indices = {piece: index for index, piece in enumerate(actual)}
    for index, piece in enumerate(expected):
        if piece is None or (index < len(actual) and actual[index] == piece):
            continue
        if piece in indices:
            return defect(DefectKind.VOCABULARY_MOVED, piece=piece, index=indices[piece], expected=index)
    return None
