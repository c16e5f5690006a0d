"""Before training: does llama.cpp split the prompts of all prepared chats into the tokens that training has?

The prepared chats are token ids. What stands between two added tokens is a text that any tokenizer encodes by itself,
so each such text is asked for once, however many chats have it. A text is read back from its tokens; that this is the
text is proven by the trained tokenizer, which has to encode it as it was trained. Where a normalizer changed the text
before, this can't be seen any more: traits of the chats say so (`chats.traits`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kolotune.chats.tokens.backend import bare
from kolotune.chats.tokens.token_bytes import TokenBytes, decodes_bytes

from .prompt_proof import Mismatch, mismatch_of_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_TOKENS = 2_000_000
"""Tokens of different texts that are asked for; 100,000 take about a second."""
_CHATS_AT_ONCE = 2_000
_SPACE = "\u2581"  # SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

SplitTexts = Callable[[Sequence[str]], list[list[int]]]
"""llama.cpp's tokens of each of several texts."""


@dataclass
class PreparedPrompts:
    """What llama.cpp makes of the prompts of prepared chats.

    Attributes:
        chats: the number of prepared chats.
        asked: of these, how many prompts were asked for.
        different: of these, how many have other tokens than in training.
        mismatch: in the first of them.
    """

    chats: int = 0
    asked: int = 0
    different: int = 0
    mismatch: Mismatch | None = None


class _Text(NamedTuple):
    """The tokens of a text, and the added token before it, which may decide how it is encoded; -1 for none."""

    before: int
    ids: tuple[int, ...]


@dataclass
class _Judge:
    """Knows of each text whether llama.cpp has the trained tokens for it."""

    backend: Tokenizer
    split: SplitTexts
    pieces: Sequence[str | None]
    wrong: dict[_Text, Mismatch] = field(default_factory=dict)
    _known: set[int] = field(default_factory=set)
    tokens: int = 0

    def __post_init__(self) -> None:
        self._bytes = TokenBytes(self.backend)
        self._is_bytes = decodes_bytes(self.backend)

    def new(self, texts: Sequence[_Text]) -> list[_Text]:
        """Return the texts that were not judged yet, and note that they are now."""
        fresh = []
        for text in texts:
            if (key := hash(text)) not in self._known:
                self._known.add(key)
                self.tokens += len(text.ids)
                fresh.append(text)
        return fresh

    def judge(self, texts: Sequence[_Text]) -> None:
        """Ask for texts, and keep those whose tokens differ."""
        # SentencePiece may put a space in front of a text, which is no part of it.
        for trims in (False,) if self._is_bytes else (True, False):
            written = [self._written(text.ids) for text in texts]
            candidates = [each.removeprefix(" ") if trims else each for each in written]
            asked = [pair for pair in zip(texts, candidates, strict=True) if pair[1]]
            served = self.split([candidate for _, candidate in asked])
            texts = [text for text, candidate in zip(texts, candidates, strict=True) if not candidate]
            for (text, candidate), ids in zip(asked, served, strict=True):
                is_equal = tuple(ids) == text.ids
                if is_equal and self._is_bytes:
                    continue
                if not self._encodes(text, candidate):
                    texts.append(text)
                elif not is_equal:
                    self.wrong[text] = mismatch_of_tokens(text.ids, ids, self.pieces)

    def _encodes(self, text: _Text, written: str) -> bool:
        """Whether the trained tokenizer makes these tokens of a text."""
        before = "" if text.before < 0 else str(self.backend.id_to_token(text.before))
        encoded = self.backend.encode(before + written, add_special_tokens=False).ids
        return tuple(encoded) == (text.ids if text.before < 0 else (text.before, *text.ids))

    def _written(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; "" where that is not certain."""
        parts = self._bytes.of(list(ids)) if self._is_bytes else [self._piece(index) for index in ids]
        try:
            return b"".join(parts or ()).decode()
        except UnicodeDecodeError:
            return ""

    def _piece(self, index: int) -> bytes:
        piece = str(self.backend.id_to_token(index))
        match = _BYTE.fullmatch(piece)
        return bytes([int(match[1], 16)]) if match else piece.replace(_SPACE, " ").encode()


def check_prepared_prompts(
    file: Path, backend: Tokenizer, pieces: Sequence[str | None], split: SplitTexts, most: int = MOST_TOKENS
) -> PreparedPrompts:
    """Return what llama.cpp makes of the prompts of prepared chats.

    Args:
        file: that `prepare` wrote.
        backend: the trained tokenizer.
        pieces: the vocabulary by token id.
        split: asks llama.cpp, with special tokens read as plain text.
        most: how many tokens of different texts are asked for; past that, no more chats are.
    """
    result = PreparedPrompts()
    added = frozenset(backend.get_added_tokens_decoder())
    judge = _Judge(backend, split, pieces)
    chats = _chats(file, added, result)
    with bare(backend):
        while judge.tokens < most and (some := list(itertools.islice(chats, _CHATS_AT_ONCE))):
            judge.judge(judge.new([text for texts in some for text in texts]))
            result.asked += len(some)
            different = [found for texts in some if (found := next(filter(judge.wrong.__contains__, texts), None))]
            result.different += len(different)
            if different and result.mismatch is None:
                result.mismatch = judge.wrong[different[0]]
    return result


def _chats(file: Path, added: frozenset[int], result: PreparedPrompts) -> Iterator[list[_Text]]:
    """Yield the texts in the prompts of each chat, in a random order; count the chats."""
    import numpy as np
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        offsets = tensors.get_tensor("offsets").tolist()
        firsts = tensors.get_tensor("chats").tolist() if "chats" in tensors.keys() else range(len(offsets))  # noqa: SIM118
        result.chats = len(firsts) - 1
        ids, labelled = tensors.get_slice("ids"), tensors.get_slice("labelled")
        for chat in np.random.default_rng(0).permutation(result.chats).tolist():
            start, stop = offsets[firsts[chat]], offsets[firsts[chat + 1]]
            tokens, labels = ids[start:stop].tolist(), labelled[start:stop].tobytes()
            texts: list[_Text] = []
            for number in range(firsts[chat], firsts[chat + 1]):
                span = slice(offsets[number] - start, offsets[number + 1] - start)
                texts += _texts(tokens[span][: labels[span].rfind(b"\0\1") + 1], added)
            yield texts


def _texts(ids: Sequence[int], added: frozenset[int]) -> Iterator[_Text]:
    before, start = -1, 0
    for at, index in enumerate(ids):
        if index in added:
            if at > start:
                yield _Text(before, tuple(ids[start:at]))
            before, start = index, at + 1
    if len(ids) > start:
        yield _Text(before, tuple(ids[start:]))
