"""Shingles: three words in a row, by which texts are compared. Two texts are similar if they share most of them.

Example: the shingles of "the cat sat down" are "the cat sat" and "cat sat down", each as a number of 64 bits.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from typing import NamedTuple

import numpy as np

from ..chat import Chat

SHOWN_CHARACTERS = 60
"""Characters of an answer that are shown to the user."""
_SHINGLE_WORDS = 3
_OPENING_WORDS = 4
# Scripts without spaces between words: every character counts as one.
_WORD = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\\W_]+")
# What the expression does to a text in ASCII: its letters and digits are words, the rest is between them.
_ASCII_WORDS = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(0x80)}
_MOST_WORDS, _LONGEST_WORD = 1 << 14, 64
_MIX = np.uint64(0x9E3779B97F4A7C15)


class AnswerFeatures(NamedTuple):
    """What is compared of an answer.

    Attributes:
        start: Its first words, to show.
        text: A hash of the text.
        opening: A hash of its first words; 0 if it has no more than these.
    """

    start: str
    text: int
    opening: int


class ChatFeatures(NamedTuple):
    """What is compared of a chat.

    Attributes:
        source, line: Where the chat was read.
        question: A hash of the text of its questions; 0 if it is too short.
        shingles: Of its questions, and of its answers: uint64 in memory, sorted, without repetition.
        answers: The features of each answer.
    """

    source: str
    line: int
    question: int
    shingles: tuple[bytes, bytes]
    answers: tuple[AnswerFeatures, ...]

    @classmethod
    def of(cls, chat: Chat) -> ChatFeatures:
        """Return the features of a chat."""
        answers = [(turn.content, _words(turn.content)) for turn in chat.messages if turn.role == "assistant"]
        question = _words("\n".join(turn.content for turn in chat.messages if turn.role in ("user", "tool")))
        calls = _words("\n".join(str(call.get("function")) for turn in chat.messages for call in turn.tool_calls))
        answer = [*(word for _, words in answers for word in words), *calls]
        return cls(
            str(chat.source),
            chat.line,
            _digest(question) if len(question) >= _SHINGLE_WORDS else 0,
            (_shingles(question), _shingles(answer)),
            tuple(
                AnswerFeatures(
                    " ".join(text[: 2 * SHOWN_CHARACTERS].split()),
                    _digest(words),
                    _digest(words[:_OPENING_WORDS]) if len(words) > _OPENING_WORDS else 0,
                )
                for text, words in answers
                if words
            ),
        )


def _words(text: str) -> list[str]:
    """Return the words without case, punctuation and the different spellings of one character."""
    if text.isascii():
        return text.translate(_ASCII_WORDS).split()
    text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


def _digest(words: list[str]) -> int:
    """Return a hash of 64 bits, which is never 0."""
    data = " ".join(words).encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data) | 1


def _shingles(words: list[str]) -> bytes:
    if len(_HASHES) > _MOST_WORDS:
        _HASHES.clear()
    hashes = np.array([_HASHES[word] for word in words], np.uint64)
    if 0 < len(hashes) < _SHINGLE_WORDS:
        hashes = np.pad(hashes, (0, _SHINGLE_WORDS - len(hashes)))
    mixed = np.zeros(max(0, len(hashes) - _SHINGLE_WORDS + 1), np.uint64)
    for offset in range(_SHINGLE_WORDS):
        mixed *= _MIX
        mixed += hashes[offset : offset + len(mixed)]
    mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    mixed.sort()  # np.unique takes twice the time for so few
    is_first = np.ones(len(mixed), bool)
    np.not_equal(mixed[1:], mixed[:-1], out=is_first[1:])
    return mixed[is_first].tobytes()


class _WordHashes(dict[str, int]):
    """The hashes of words, most of which occur again."""

    def __missing__(self, word: str) -> int:
        value = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        if len(word) <= _LONGEST_WORD:
            self[word] = value
        return value


_HASHES = _WordHashes()
