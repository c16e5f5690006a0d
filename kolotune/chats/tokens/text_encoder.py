"""Encode documents: plain text between the tokens with which the base begins and ends a text.

A document that is too long becomes several pieces. Each piece after the first begins with the last token of the one
before, from which its first new token is predicted, so every token is trained once. Nothing could predict the first
token of a document where the base has no token that begins a text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError, ModelError

from .backend import bare, check_decodes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class TextEncoder:
    """Encodes documents. Can be sent to another process.

    The text of a special token in a document is plain text.

    Args:
        tokenizer: The base model's tokenizer.

    Raises:
        ModelError: It has no token that ends a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        end = tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ModelError(
                "the tokenizer names no token that ends a text (eos_token)", "Choose a base model whose tokenizer does."
            )
        self.begin, self.end = begin_tokens(tokenizer), end
        self._backend: Tokenizer = tokenizer.backend_tokenizer

    def encode_all(self, texts: Sequence[str]) -> list[list[int] | DataError]:
        """Return the tokens of each document, between those that begin and end it; or why it can't be encoded."""
        backend = self._backend
        with bare(backend):
            backend.encode_special_tokens = True
            return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> list[int] | DataError:
        try:
            ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
            check_decodes(text, "", ids, self._backend)
        except (TypeError, UnicodeEncodeError):
            return DataError("the text contains half a character (a lone surrogate)")
        except DataError as error:
            return error
        return [*self.begin, *ids, self.end]


def begin_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the special tokens that the tokenizer itself puts in front of a text."""
    ids = list(tokenizer("a")["input_ids"])
    special = set(tokenizer.all_special_ids)
    return ids[: next((at for at, token in enumerate(ids) if token not in special), 0)]


def pieces_of(ids: Sequence[int], longest: int) -> list[Sequence[int]]:
    """Cut the tokens of a document into pieces of at most `longest`; each begins with the last token of the one before.

    Args:
        ids: At least two.
        longest: At least 2.
    """
    return [ids[start : start + longest] for start in range(0, len(ids) - 1, longest - 1)]


def packed_piece_labels(piece: Sequence[int]) -> bytes:
    """Return for each token of a piece a byte: whether the loss falls on it. It does not on the first."""
    return b"\0" + b"\1" * (len(piece) - 1)


def packed_pieces(pieces: Sequence[Sequence[int]]) -> bytes:
    """Return the tokens of all pieces, end to end, as int32 in memory."""
    return b"".join(array("i", piece).tobytes() for piece in pieces)
