"""Choices beside a question: the forms that they and their answers are written in."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.chats.reading.faults import FaultKind
from kolotune.chats.reading.shapes import read_record

LABELLED = {"label": ["1", "2", "3"], "text": ["x", "y", "z"]}


def read(choices: Any, answer: Any, question: str = "q") -> tuple[str, str]:
    shaped = read_record({"question": question, "choices": choices, "answer": answer})
    assert not shaped.faults
    user, assistant = shaped.messages
    return user.content, assistant.content


@pytest.mark.parametrize("answer", [1, 1.0, "1", "1.0", "B", "b", "B.", "B)", "(B)", "(b)", "[B]", "B:", " B ", ["B"]])
def test_a_choice_by_its_letter_or_number(answer: Any) -> None:
    assert read(["x", "y", "z"], answer) == ("q\n\nA. x\nB. y\nC. z", "B. y")


@pytest.mark.parametrize(
    ("choices", "answer", "learnt"),
    [
        (LABELLED, "1", "1. x"),
        (LABELLED, 1, "1. x"),
        ('["x", "y"]', "1", "B. y"),
        (["0", "2", "1"], 1, "B. 2"),  # MMLU: a number beside texts is an index
        (["0", "2", "1"], "1", "1"),
        ([0, 2, 1], 1, "C. 1"),
        ([3, 4, 5], 4, "B. 4"),
        (["I", "me"], "I", "I"),
        (["x", "y"], "y", "y"),
        (["x", "y"], "y, because", "y, because"),
    ],
)
def test_what_an_answer_means(choices: Any, answer: Any, learnt: str) -> None:
    assert read(choices, answer)[1] == learnt


@pytest.mark.parametrize(
    ("choices", "answer"), [(["x", "y", "z"], each) for each in (3, -1, "3", "D", "(D)")] + [(LABELLED, 0)]
)
def test_an_answer_that_no_choice_has_is_refused(choices: Any, answer: Any) -> None:
    (fault,) = read_record({"question": "q", "choices": choices, "answer": answer}).faults
    assert fault.kind is FaultKind.BAD_CONTENT
    assert "but the choices are" in fault.detail


@pytest.mark.parametrize("mark", ["A. ", "A) ", "(A) ", "A: ", "a. "])
def test_letters_before_choices_are_not_doubled(mark: str) -> None:
    other = mark.replace("A", "B").replace("a", "b")
    for answer in ("A", 0):
        assert read([f"{mark}x", f"{other}y"], answer) == ("q\n\nA. x\nB. y", "A. x")
    assert read({"A": f"{mark}x", "B": f"{other}y"}, "A") == ("q\n\nA. x\nB. y", "A. x")
    assert read(["A. Smith", "C. Jones"], "A")[1] == "A. A. Smith"


@pytest.mark.parametrize("question", ["q\nA. x\nB. y", "q A) x B) y", "q\n(A) x\n(B) y"])
def test_choices_that_the_question_lists_are_not_listed_again(question: str) -> None:
    assert read(["x", "y"], "B", question) == (question, "B. y")
