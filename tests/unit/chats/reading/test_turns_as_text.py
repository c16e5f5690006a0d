"""Texts that are turns, and those that only look so."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kolotune.chats.reading.turns_as_text import first_role, turns_as_text

TURNS: list[Any] = [{"role": "user", "content": 'it\'s\n"q"'}, {"role": "assistant", "content": "}\n {"}]


def test_json_python_and_numpy() -> None:
    import numpy

    for text in (json.dumps(TURNS), repr(TURNS), str(numpy.array(TURNS, dtype=object))):
        assert turns_as_text(text) == TURNS
    assert turns_as_text(json.dumps(TURNS[1])) == TURNS[1:]
    assert first_role(TURNS) == "user" and first_role([]) is None and first_role(["x"]) is None


@pytest.mark.parametrize(
    "value",
    [
        None, 1, TURNS, "q", "[]", '[{"x": 1}]', '{"text": "a"}', '[{"role": "boss", "content": "q"}]',
        '[{"role": "user", "content": "q"}, 5]', '[{"role": "user", "content": q}]', '[{"role": "user", "content": "q"',
        "[{'role': 'user', 'content': '\\ud800'}]", "[{'role': 'user', 'content': {1}}]",
        "[{'role': " * 5000,
    ],
)  # fmt: skip
def test_other_values_are_none(value: Any) -> None:
    assert turns_as_text(value) is None
