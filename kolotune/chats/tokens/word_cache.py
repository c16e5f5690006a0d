"""The tokens of words, remembered from one text to the next.

Byte-level tokenizers split a text into words with one regular expression, and encode each word separately. Most words
of a text are known from earlier texts, so looking them up takes a sixth of the time of encoding. Each entry is the
model's own answer, proven to be the bytes of the word. The text is split here if the tokenizer splits in a known way,
and if the text has only characters on which all versions of Unicode agree; all else is left to the tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .encoded_chat import packed
from .served_tokenizer import described
from .token_bytes import byte_letters, decodes_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same in a text that was split at each digit before.
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_TOKEN = re.compile(r"\\[pP]\{(?P<class>[LN])\}|\\[sSrn]|[^\\]")
_SYNTAX = re.compile(rf"(?:\(\?(?:i?:|!)|(?!\(\?|\[:|&&)(?:{_TOKEN.pattern}))*")
_MOST_WORDS = 1 << 16
_MOST_TEXTS, _LONGEST_TEXT, _MOST_HASHES = 512, 16_384, 4_096
# Latin letters and the punctuation used with them. Left out: kinds of space, and letters whose upper or lower case is
# irregular (a long s, a dotless i).
_COMMON = [
    char
    for char in map(chr, [*range(0x80), *range(0xA1, 0x250), *range(0x2010, 0x2028), *range(0x2030, 0x205F), 0x20AC])
    if char not in "\u00ad\u0130\u0131\u0149\u017f\u01f0"
]
_ASCII = [char for char in _COMMON if char.isascii()]
_UNCOMMON = re.compile(f"[^{re.escape(''.join(_COMMON))}]")


class WordCache:
    """Encodes plain text with what a tokenizer said of its words before.

    Args:
        backend: A tokenizer that splits texts like `pattern`.
        pattern: Matches the next word, in the tokenizer's syntax.

    Raises:
        ValueError: The pattern can't be translated.
    """

    def __init__(self, backend: Tokenizer, pattern: str) -> None:
        self._model = backend.model
        self._split_ascii, self._split_common = (
            _translated(pattern, characters).findall for characters in (_ASCII, _COMMON)
        )
        self._letters = {byte: letter for letter, byte in byte_letters().items()}
        self._added = {str(token): packed([index]) for index, token in backend.get_added_tokens_decoder().items()}
        self._words: dict[str, bytes] = {}
        self._texts: dict[str, bytes] = {}
        self._seen_once: set[int] = set()

    @property
    def added(self) -> frozenset[str]:
        """The texts of the tokens that the tokenizer looks for before it splits."""
        return frozenset(self._added)

    def ids(self, parts: Sequence[str]) -> bytes | None:
        """Return the tokens of a text as packed int32; None if the tokenizer has to encode it.

        Args:
            parts: The text as the tokenizer takes it apart: plain text and added token in alternation.
        """
        packed_ids = []
        for number, part in enumerate(parts):
            if number % 2:
                packed_ids.append(self._added[part])
            elif part:
                ids = self._texts.get(part) or self._plain(part)
                if ids is None:
                    return None
                packed_ids.append(ids)
        return b"".join(packed_ids)

    def _plain(self, text: str) -> bytes | None:
        if text.isascii():
            words = self._split_ascii(text)
        elif _UNCOMMON.search(text):
            return None
        else:
            words = self._split_common(text)
        if "".join(words) != text:
            return None
        try:
            ids = b"".join(map(self._words.__getitem__, words))
        except KeyError:
            if not self._learn(words):
                return None
            ids = b"".join(map(self._words.__getitem__, words))
        self._keep(text, ids)
        return ids

    def _learn(self, words: Sequence[str]) -> bool:
        """Ask the model for the words that are new; return whether it can encode all of them."""
        if len(self._words) > _MOST_WORDS:
            self._words.clear()
        for word in words:
            if word not in self._words:
                letters = "".join([self._letters[byte] for byte in word.encode()])
                tokens = self._model.tokenize(letters)
                if "".join([token.value for token in tokens]) != letters:
                    return False
                self._words[word] = packed([token.id for token in tokens])
        return True

    def _keep(self, text: str, ids: bytes) -> None:
        """Remember a text that occurs a second time, as a system prompt does."""
        if len(text) > _LONGEST_TEXT:
            return
        if len(self._seen_once) >= _MOST_HASHES:
            self._seen_once.clear()
        if len(self._texts) >= _MOST_TEXTS:
            self._texts.clear()
        key = hash(text)
        if key in self._seen_once:
            self._texts[text] = ids
        self._seen_once.add(key)


def find_word_cache(backend: Tokenizer) -> WordCache | None:
    """Return an empty word cache for a tokenizer; None if it is unknown how the tokenizer splits texts."""
    pattern = _pattern(backend)
    if pattern is None:
        return None
    try:
        cache = WordCache(backend, pattern)
    except ValueError:
        return None
    for text in _samples():
        ids = cache.ids([text])
        if ids is not None and ids != packed(backend.encode(text, add_special_tokens=False).ids):
            return None
    return cache


def _pattern(backend: Tokenizer) -> str | None:
    """Return what matches the next word, by the tokenizer's description of itself."""
    if not decodes_bytes(backend) or type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return None
    if backend.normalizer is not None:
        return None
    if any(token.lstrip or token.rstrip or token.single_word for token in backend.get_added_tokens_decoder().values()):
        return None
    match described(backend.pre_tokenizer):
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            pass
        case step:
            steps = [step]
    match steps:
        case [*splits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(use_regex)}]:
            pass
        case _:
            return None
    match splits, use_regex:
        case [], True:
            return _GPT2
        case [{"type": "Digits", "individual_digits": True}], True:
            return _GPT2_DIGITS
        case [{"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}], False:
            return pattern
    return None


def _translated(pattern: str, characters: Sequence[str]) -> re.Pattern[str]:
    """Translate a tokenizer's pattern into the syntax of `re`, for texts of these characters.

    Raises:
        ValueError: It contains something unknown.
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
    """Return texts in which everything that patterns distinguish occurs next to everything else."""
    kinds = (
        "a", "Zo", "é", "7", "12345", "²", " ", "  ", "\n", "\r\n\n", "\t", "'", "'s", "'LL", "\u2019", ".", "!?", "_",
        "-", "/\n",
    )  # fmt: skip
    pairs = [one + other + third for one in kinds for other in kinds for third in ("", "x", " ", "3", "\n")]
    return ["".join(pairs), "".join(reversed(pairs)), *kinds, *pairs[::7], "".join(_COMMON), " ".join(_COMMON)]
