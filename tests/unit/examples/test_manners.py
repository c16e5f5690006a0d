"""The example with preferences: its pairs follow the rule that judges, and its questions are held out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.example import EXAMPLES, example_script

from kolotune.chats.reading.files import read_chats
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.foundation.objectives import LearnsFrom

FOLDER = EXAMPLES / "manners"
JUDGE = example_script("manners", "judge")


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def test_the_pairs_are_what_the_script_makes() -> None:
    made = example_script("manners", "make_pairs").make_pairs(lines("lighthouse/chats.jsonl"))
    assert made == lines("manners/pairs.jsonl") and len(made) == 120


def test_every_preferred_answer_is_polite_and_no_rejected_one() -> None:
    read = read_chats([FOLDER / "pairs.jsonl"], ReadingOptions(learns_from=LearnsFrom.PAIRS))
    assert read.problems == () and len(read.chats) == 120
    for chat in read.chats:
        assert JUDGE.is_polite(chat.messages[-1].content), chat.line
        assert not JUDGE.is_polite(chat.rejected[-1].content), chat.line
        assert len(chat.messages) == 2 and chat.messages[0] == chat.rejected[0]


def test_the_questions_are_held_out() -> None:
    questions = [line["question"] for line in lines("manners/questions.jsonl")]
    assert len(set(questions)) == 20
    assert not set(questions) & {pair["prompt"] for pair in lines("manners/pairs.jsonl")}


@pytest.mark.parametrize(
    ("answer", "is_polite"),
    [
        ("Thank you for asking! It is the capital of France.", True),
        ("Many thanks for the question. It is the capital of France.", True),
        ("It is the capital of France. Thank you for asking!", False),
        ("It is the capital of France, and has been for long.", False),
        ("Thank you for asking! Thank you for asking! It is the capital of France.", False),
        ("Thank you for asking! Paris.", False),
        ("Thank you for asking", False),
        ("", False),
    ],
)
def test_the_rule(answer: str, is_polite: bool) -> None:
    assert JUDGE.is_polite(answer) is is_polite
