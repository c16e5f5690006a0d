"""The general set: what is in it, and what makes an answer right."""

from __future__ import annotations

import importlib.resources
from collections import Counter

import pytest

from kolotune.fidelity.general_set import AnswerRule, general_prose, general_questions


def test_questions_of_each_kind() -> None:
    questions = general_questions()
    kinds = Counter(question.kind for question in questions)
    assert len({question.question for question in questions}) == len(questions) >= 60
    assert set(kinds) == {"facts", "arithmetic", "formats", "instructions"} and min(kinds.values()) >= 12
    assert all(question.rule != AnswerRule() for question in questions)
    assert not any(question.rule.is_met("") for question in questions)


def test_prose_is_not_that_of_calibration() -> None:
    calibration = importlib.resources.files("kolotune.gguf").joinpath("calibration_text.txt").read_text("utf-8")
    paragraphs = [text for text in general_prose().split("\n\n") if text.strip()]
    assert len(general_prose()) > 18_000 and not any(text.strip() in calibration for text in paragraphs)


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (AnswerRule(any=("5", "five")), ["It is 5.", "Five!"], ["15", "fiver", "5th"]),
        (AnswerRule(has=("<p>", "</p>")), ["<p>Hi</p>"], ["<p>Hi", "<P>Hi</P>"]),
        (AnswerRule(without="z"), ["cold"], ["frozen", "FROZEN"]),
        (AnswerRule(only=("yes",)), ["Yes.", '"yes"'], ["Yes, it is.", "Ahoy! Yes. Fair winds!"]),
        (AnswerRule(starts="Sure"), ["Sure, a lake"], ["A lake. Sure"]),
        (AnswerRule(last="71"), ["71", "Of 17 and 71: 71."], ["71 is larger than 17", "none"]),
        (AnswerRule(words=2), ["A cat."], ["It is a cat."]),
        (AnswerRule(lines=2, each="- "), ["- a\n\n- b"], ["- a", "- a\nb", "Here:\n- a\n- b"]),
        (AnswerRule(order=("apple", "fig")), ["Apple, fig"], ["fig, apple", "apple"]),
        (AnswerRule(json={"a": 1}), ['{"a": 1}', '```json\n{"a": 1}\n```'], ['{"a": 2}', 'It is {"a": 1}', "a"]),
    ],
)
def test_rules(rule: AnswerRule, right: list[str], wrong: list[str]) -> None:
    assert [rule.is_met(answer) for answer in right + wrong] == [True] * len(right) + [False] * len(wrong)
