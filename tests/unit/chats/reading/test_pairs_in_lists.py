"""Lists of objects that are a question and its answer each."""

from __future__ import annotations

from typing import Any

import pytest
from support.documented_chats import turns_shown

from kolotune.chats.chat import Message
from kolotune.chats.reading.shapes import read_record

PAIR = {"input": "q", "output": "a"}


def test_xtuner_says_which_answers_count() -> None:
    other = {"system": "", "input": "r", "output": "b", "output_with_loss": True}
    shaped = read_record({"conversation": [{"system": "s", **PAIR, "output_with_loss": False}, other]})
    assert turns_shown(shaped.messages) == "S s · U q · A a · U r · A b"
    assert [message.weight for message in shaped.messages if message.role == "assistant"] == [0, 1]
    assert shaped.unread == ()


@pytest.mark.parametrize("pair", [PAIR, {"question": "q", "answer": "a"}, {"output": "a", "input": "q"}])
def test_other_keys_of_a_pair_are_the_answers(pair: dict[str, Any]) -> None:
    shaped = read_record({"conversation": [{**pair, "model": "x", "system": None}]})
    assert shaped.messages == (Message("user", "q"), Message("assistant", "a"))
    assert shaped.unread == ("turns: model",)
    thinking = read_record({"conversation": [{**pair, "reasoning": "t"}]})
    assert turns_shown(thinking.messages) == "U q · A(t) a"


@pytest.mark.parametrize(
    "turn", [{**PAIR, "role": "user", "content": "x"}, {**PAIR, "output": 1}, {"input": "q", "x": 1}]
)
def test_other_objects_are_no_pairs(turn: dict[str, Any]) -> None:
    assert read_record({"conversation": [turn]}).faults
