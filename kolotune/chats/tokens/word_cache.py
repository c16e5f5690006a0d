"""Tokens of plain text, word by word: the tokenizer's own answers, kept.

Byte-level tokenizers cut a text into words by one regular expression and encode each word by itself. Most words of a
text have come before, so that a table has their tokens in a sixth of the time that the tokenizer takes. Each entry is
the model's own answer, proven to be the word's bytes. The cutting is done here, for tokenizers that say that they cut
in a way that is known, and for texts of characters on which all versions of Unicode agree; anything else is the
tokenizer's to encode.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections.abc import Sequence
from typing import Any

from .token_bytes import byte_letters, writes_bytes

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same in a text that was cut at each digit before.
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_TOKEN = re.compile(r"\\[pP]\{(?P<class>[LN])\}|\\[sSrn]|[^\\]")
_SYNTAX = re.compile(rf"(?:\(\?(?:i?:|!)|(?!\(\?|\[:|&&)(?:{_TOKEN.pattern}))*")
_MOST_WORDS = 1 << 16
_MOST_TEXTS, _LONGEST_TEXT, _REMEMBERED = 512, 16_384, 4_096
# Latin letters and the marks of writing that stand with them. Left out: kinds of space, and letters that are another
# one's small or capital form in a way of their own (a long s, a dotless i).
_COMMON = [
    char
    for char in map(chr, [*range(0x80), *range(0xA1, 0x250), *range(0x2010, 0x2028), *range(0x2030, 0x205F), 0x20AC])
    if char not in "\u00ad\u0130\u0131\u0149\u017f\u01f0"
]
_ASCII = [char for char in _COMMON if char.isascii()]
_UNCOMMON = re.compile(f"[^{re.escape(''.join(_COMMON))}]")


class Words:
    """Encodes plain text with what a tokenizer said of its words before.

    Args:
        backend: a tokenizer that `pattern` cuts texts like.
        pattern: matches the next word, in the tokenizer's syntax.

    Raises:
        ValueError: the pattern can't be read here.
    """

    def __init__(self, backend: Any, pattern: str) -> None:
        self._model = backend.model
        self._in_ascii, self._in_others = (_translated(pattern, each).findall for each in (_ASCII, _COMMON))
        self._letters = {byte: letter for letter, byte in byte_letters().items()}
        self._added = {str(token): packed([index]) for index, token in backend.get_added_tokens_decoder().items()}
        self._known: dict[str, bytes] = {}
        self._texts: dict[str, bytes] = {}
        self._once: set[int] = set()

    @property
    def added(self) -> frozenset[str]:
        """The texts of the tokens that the tokenizer looks for before it cuts."""
        return frozenset(self._added)

    def ids(self, parts: Sequence[str]) -> bytes | None:
        """The tokens of a text as packed int32.

        Args:
            parts: plain text and added token in turns, as the tokenizer takes the text apart.

        Returns:
            The ids; None when the tokenizer has to be asked.
        """
        out = []
        for number, part in enumerate(parts):
            if number % 2:
                out.append(self._added[part])
            elif part:
                found = self._texts.get(part) or self._plain(part)
                if found is None:
                    return None
                out.append(found)
        return b"".join(out)

    def _plain(self, text: str) -> bytes | None:
        if text.isascii():
            words = self._in_ascii(text)
        elif _UNCOMMON.search(text):
            return None
        else:
            words = self._in_others(text)
        if "".join(words) != text:
            return None
        try:
            found = b"".join(map(self._known.__getitem__, words))
        except KeyError:
            if len(self._known) > _MOST_WORDS:
                self._known.clear()
            for word in words:
                if word not in self._known:
                    ids = self._ask(word)
                    if ids is None:
                        return None
                    self._known[word] = ids
            found = b"".join(map(self._known.__getitem__, words))
        self._keep(text, found)
        return found

    def _keep(self, text: str, ids: bytes) -> None:
        """Keeps what comes a second time, as a system prompt does."""
        if len(text) > _LONGEST_TEXT:
            return
        if len(self._once) >= _REMEMBERED:
            self._once.clear()
        if len(self._texts) >= _MOST_TEXTS:
            self._texts.clear()
        key = hash(text)
        if key in self._once:
            self._texts[text] = ids
        self._once.add(key)

    def _ask(self, word: str) -> bytes | None:
        letters = "".join([self._letters[byte] for byte in word.encode()])
        tokens = self._model.tokenize(letters)
        if "".join([token.value for token in tokens]) != letters:
            return None
        return packed([token.id for token in tokens])


def words_of(backend: Any) -> Words | None:
    """The words of a tokenizer; None when it is not known how it cuts texts."""
    pattern = _pattern(backend)
    if pattern is None:
        return None
    try:
        words = Words(backend, pattern)
    except ValueError:
        return None
    for text in _samples():
        found = words.ids([text])
        if found is not None and found != packed(backend.encode(text, add_special_tokens=False).ids):
            return None
    return words


def _pattern(backend: Any) -> str | None:
    """What matches the next word, by what the tokenizer says of itself."""
    if not writes_bytes(backend) or type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return None
    # NFC changes none of the characters that are taken here.
    if backend.normalizer is not None and _described(backend.normalizer) != {"type": "NFC"}:
        return None
    if any(
        token.lstrip or token.rstrip or token.single_word or (token.normalized and backend.normalizer is not None)
        for token in backend.get_added_tokens_decoder().values()
    ):
        return None
    cutting = _described(backend.pre_tokenizer)
    steps = cutting.get("pretokenizers", [cutting])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    match steps[:-1], last.get("use_regex"):
        case [], True:
            return _GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return _GPT2_DIGITS
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}], False:
            return pattern
    return None


def _described(part: Any) -> dict[str, Any]:
    found = json.loads(part.__getstate__()) if part is not None else {}
    return found if isinstance(found, dict) else {}


def _translated(pattern: str, characters: Sequence[str]) -> re.Pattern[str]:
    """A tokenizer's pattern in the syntax of `re`, for texts of these characters.

    Raises:
        ValueError: it has more in it than is known here.
    """
    if not _SYNTAX.fullmatch(pattern):
        raise ValueError(pattern)
    classes = {kind: "".join(re.escape(c) for c in characters if unicodedata.category(c)[0] == kind) for kind in "LN"}
    classes["s"] = re.escape(" \t\n\r\v\f")
    inside = False

    def translated(match: re.Match[str]) -> str:
        nonlocal inside
        token = match[0]
        if token in "[]":
            inside = token == "["
        name = match["class"] or token[1:].lower()
        if name not in classes:
            return token
        negated = token[1].isupper()
        if inside and negated:
            raise ValueError(pattern)
        return classes[name] if inside else f"[{'^' * negated}{classes[name]}]"

    return re.compile(_TOKEN.sub(translated, pattern))


def _samples() -> list[str]:
    """Texts in which all that patterns tell apart stands beside all else."""
    kinds = (
        "a", "Zo", "é", "7", "12345", "²", " ", "  ", "\n", "\r\n\n", "\t", "'", "'s", "'LL", "\u2019", ".", "!?", "_",
        "-", "/\n",
    )  # fmt: skip
    pairs = [one + other + third for one in kinds for other in kinds for third in ("", "x", " ", "3", "\n")]
    return ["".join(pairs), "".join(reversed(pairs)), *kinds, *pairs[::7], "".join(_COMMON), " ".join(_COMMON)]


def packed(ids: Sequence[int]) -> bytes:
    """Token ids as int32 in memory."""
    return array("i", ids).tobytes()
