"""What the encoder needs of a tokenizer's backend: encode texts exactly, with the position of each token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

from kolotune.foundation.errors import DataError

from ..templates.rendering import Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class SpecialToken(NamedTuple):
    """A special token: its id, and whether it absorbs the white space before and behind it."""

    id: int
    lstrip: bool
    rstrip: bool


@dataclass
class OffsetTokens:
    """Token ids with the start and end of each token in the text, in characters."""

    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], offsets: Sequence[Span], base: int) -> None:
        """Append tokens whose offsets count from `base`."""
        self.ids += ids
        self.starts += [base + start for start, _ in offsets]
        self.ends += [base + end for _, end in offsets]


def special_tokens_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, SpecialToken]:
    """Return the special tokens of a tokenizer by their text."""
    tokens = {
        str(token.content): SpecialToken(index, bool(token.lstrip), bool(token.rstrip))
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for text in map(str, tokenizer.all_special_tokens):
        tokens.setdefault(text, SpecialToken(cast(int, tokenizer.convert_tokens_to_ids(text)), False, False))
    return tokens


@contextmanager
def bare(backend: Tokenizer) -> Iterator[None]:
    """Switch off everything that cuts, pads or rounds, and restore it at the end of the block.

    A post-processor may trim white space off the offsets, and what an earlier caller asked for (truncation, padding)
    stays set in the backend.
    """
    post, as_text = backend.post_processor, backend.encode_special_tokens
    truncation, padding = backend.truncation, backend.padding
    backend.post_processor, backend.encode_special_tokens = None, False
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        backend.post_processor, backend.encode_special_tokens = post, as_text
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def encode_text(backend: Tokenizer, text: str) -> OffsetTokens:
    """Encode a whole text and parse the special tokens in it, as llama.cpp reads a rendered prompt."""
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError("a text contains half a character (a lone surrogate)") from error
    tokens = OffsetTokens()
    tokens.add(encoding.ids, encoding.offsets, 0)
    return tokens


def check_decodes(text: str, skeleton: str, ids: list[int], backend: Tokenizer) -> None:
    """Check that the ids decode to the text, if this tokenizer decodes texts exactly at all.

    Args:
        text: The text.
        skeleton: What a template wrote around contents; a tokenizer that changes that is not exact.
        ids: The tokens of the text.
        backend: The tokenizer.

    Raises:
        DataError: They do not.
    """
    if "ByteLevel" not in repr(backend.decoder):
        return  # SentencePiece writes a space and ▁ alike

    def is_same(text: str, ids: list[int]) -> bool:
        normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
        return bool(backend.decode(ids, skip_special_tokens=False) == normal)

    if not is_same(text, ids):
        sample = backend.encode(skeleton, add_special_tokens=False).ids
        if is_same(skeleton, sample):
            raise DataError("the tokens don't decode to the text: the tokenizer lacks some of its characters")
