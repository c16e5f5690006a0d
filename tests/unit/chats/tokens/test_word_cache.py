"""The word cache gives the tokenizer's own tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.masking import CHATML_SPECIAL, byte_level
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kolotune.chats.tokens.encoded_chat import packed
from kolotune.chats.tokens.word_cache import WordCache, find_word_cache

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEXTS = ["It's what they'll say, isn't it? 12345 times:\n\n  def f(x):\r\n\treturn  x", "Grüße, ¿qué?  “so”…"] * 20
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_SPLITTING = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), _BYTES]),
    "qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_LLAMA3.replace("{1,3}", "")), "isolated"), _BYTES]),
}
_PIECES = st.one_of(
    st.sampled_from(["'s", "'LL", "  ", "\n", "\r\n", "\t", " a", "Zo", "12", "²", "é", "\u2019", "…", "!?", "_", "x"]),
    st.characters(max_codepoint=0x2100),
)


def _backend(splitting: str) -> Tokenizer:
    backend = Tokenizer.from_str(byte_level(CHATML_SPECIAL, *_TEXTS).backend_tokenizer.to_str())
    backend.pre_tokenizer = _SPLITTING[splitting]
    return backend


@pytest.mark.parametrize("splitting", _SPLITTING)
@settings(deadline=None, max_examples=150)
@given(texts=st.lists(st.lists(_PIECES, max_size=30).map("".join), min_size=1, max_size=4))
def test_words_are_the_tokenizers(splitting: str, texts: list[str]) -> None:
    backend = _backend(splitting)
    words = find_word_cache(backend)
    assert words is not None
    for _ in range(3):  # new, known, kept
        parts = [part for text in texts for part in (text, CHATML_SPECIAL[0])]
        ids = words.ids(parts)
        assert ids in (None, packed(backend.encode("".join(parts), add_special_tokens=False).ids))
        assert ids is not None or not "".join(texts).isascii()


def test_uncommon_characters_are_left_to_the_tokenizer() -> None:
    backend = _backend("qwen")
    words = find_word_cache(backend)
    assert words is not None
    assert words.ids(["é ö"]) == packed(backend.encode("é ö").ids)
    assert words.ids(["e\u0301"]) is None


def _split_by(*steps: pre_tokenizers.PreTokenizer) -> Callable[[Tokenizer], None]:
    return lambda backend: setattr(backend, "pre_tokenizer", pre_tokenizers.Sequence(list(steps)))


_UNKNOWN: dict[str, Callable[[Tokenizer], object]] = {
    "normalizer": lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()),
    "prefix space": _split_by(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "splitting": _split_by(pre_tokenizers.Whitespace(), _BYTES),
    "syntax": _split_by(pre_tokenizers.Split(Regex(r"\p{Lu}?\w+|\W"), "isolated"), _BYTES),
    "decoder": lambda backend: setattr(backend, "decoder", decoders.Fuse()),
    "dropout": lambda backend: setattr(backend.model, "dropout", 0.5),
    "trimming": lambda backend: backend.add_tokens([AddedToken("<x>", lstrip=True)]),
    "no pairs": lambda backend: setattr(backend, "model", models.WordLevel({"a": 0}, "a")),
}


@pytest.mark.parametrize("change", _UNKNOWN.values(), ids=_UNKNOWN)
def test_tokenizers_that_split_differently_have_no_cache(change: Callable[[Tokenizer], object]) -> None:
    backend = _backend("gpt2")
    change(backend)
    assert find_word_cache(backend) is None


def test_splitting_that_differs_from_the_tokenizers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kolotune.chats.tokens.word_cache._GPT2", r"\S+|\s+")
    assert find_word_cache(_backend("gpt2")) is None


def test_tables_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_MOST_WORDS", "_MOST_TEXTS", "_MOST_HASHES"):
        monkeypatch.setattr(f"kolotune.chats.tokens.word_cache.{name}", 4)
    backend = _backend("gpt2")
    words = find_word_cache(backend)
    assert isinstance(words, WordCache)
    for number in range(50):
        text = f"the same {'abcdefgh'[number % 8]}x{'abc'[number % 3]}"
        for _ in range(2):
            assert words.ids([text]) == packed(backend.encode(text).ids)
        assert len(words._words) <= 4 + 8 and len(words._texts) <= 4 and len(words._seen_once) <= 4
