"""Stops at the end of an answer, and characters split over tokens."""

from __future__ import annotations

import pytest

from kolotune.gguf.inference import _decoded, _overlap


@pytest.mark.parametrize(
    ("text", "stop", "held_back"),
    [
        ("Hello <|im", "<|im_end|>", 4),
        ("Hello", "<|im_end|>", 0),
        ("a<", "<|im_end|>", 1),
        ("abab", "abc", 2),
        ("", "x", 0),
    ],
)
def test_the_start_of_a_stop_is_held_back(text: str, stop: str, held_back: int) -> None:
    assert _overlap(text, stop) == held_back


@pytest.mark.parametrize("text", ["plain", "naïve", "日本", "🎉 party", ""])
def test_characters_split_over_tokens(text: str) -> None:
    data = text.encode("utf-8")
    for cut in range(len(data) + 1):
        whole, rest = _decoded(data[:cut])
        assert whole.encode("utf-8") + rest == data[:cut]
        assert text.startswith(whole)


def test_bytes_that_are_not_text_are_not_held_back() -> None:
    whole, rest = _decoded(b"\xff\xfe\xfd\xfc\xfb")
    assert rest == b"" and "\ufffd" in whole
