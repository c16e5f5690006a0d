"""Choices beside a question: how they are listed, and which of them an answer names."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import NamedTuple

from .faults import FaultKind, RecordError, fail
from .json_values import kind_of, list_or_value
from .printable import quoted

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NUMBER = re.compile(r"(-?\d+)(?:\.0)?")  # with .0 where a table had gaps in a column of numbers


class AnswerChoice(NamedTuple):
    """A choice: its letter, its text, and whether the record has it as a number."""

    letter: str
    text: str
    is_number: bool = False

    @property
    def line(self) -> str:
        return f"{self.letter}. {self.text}"


def read_choices(key: str, value: object) -> list[AnswerChoice]:
    """Return the choices of a list of texts, of texts by letter, or of ``{"text": […], "label": […]}``.

    Letters that the texts begin with are taken off them.

    Raises:
        RecordError: The value is something else.
    """
    with suppress(RecordError):  # a text that is no list is refused below
        value = list_or_value(value)
    if isinstance(value, dict) and isinstance(value.get("text"), list) and isinstance(value.get("label"), list):
        pairs = list(zip(value["label"], value["text"], strict=False))
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and len(value) <= len(_LETTERS):
        pairs = list(zip(_LETTERS, value, strict=False))
    else:
        pairs = [("", value)]
    if not all([isinstance(text, str | int | float) and letter for letter, text in pairs]):
        fail(FaultKind.BAD_CONTENT, f"{key} is {kind_of(value)}; it must be a list of texts")
    choices = [AnswerChoice(str(letter), str(text), not isinstance(text, str)) for letter, text in pairs]
    written = [re.match(rf"\s*{_marked(choice.letter)}\s*", choice.text, re.IGNORECASE) for choice in choices]
    if not all(written):
        return choices
    return [
        choice._replace(text=choice.text[mark.end() :]) for choice, mark in zip(choices, written, strict=True) if mark
    ]


def listed(choices: list[AnswerChoice], question: object) -> str:
    """Return the choices with their letters, one a line; "" if the question lists them already."""
    text = question if isinstance(question, str) else ""
    if all([re.search(rf"(?<!\w){_marked(each.letter)}\s*{re.escape(each.text)}(?!\w)", text) for each in choices]):
        return ""
    return "\n".join([choice.line for choice in choices])


def chosen(key: str, answer: object, choices: list[AnswerChoice]) -> object:
    """Return the letter and text of the choice that an answer names by letter or number (from 0); others stay.

    Raises:
        RecordError: The answer is a letter or a number that no choice has.
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return answer
    said = str(answer).strip()
    number = _NUMBER.fullmatch(said)
    name = number[1] if number else said.strip("()[].: ").lower()
    letters = {choice.letter.lower(): choice for choice in choices}
    if name in letters:
        return letters[name].line
    is_text = isinstance(answer, str)
    if by_text := [choice for choice in choices if choice.text == said and (is_text or choice.is_number)]:
        return answer if is_text else by_text[0].line
    have_letters = all([letter.isalpha() for letter in letters])
    if number and have_letters and 0 <= int(name) < len(choices):
        return choices[int(name)].line
    if number or (have_letters and len(name) == 1 and name.upper() in _LETTERS):
        numbers = f", or 0 to {len(choices) - 1} by number" if have_letters else ""
        names = f"{choices[0].letter} to {choices[-1].letter}{numbers}"
        fail(FaultKind.BAD_CONTENT, f"{key} is {quoted(said, 20)}, but the choices are {names}")
    return answer


def _marked(letter: str) -> str:
    """Return the pattern of a letter as it is written before a choice: ``A.``, ``A)``, ``(A)`` or ``A:``."""
    return rf"(?:\({re.escape(letter)}\)|{re.escape(letter)}[.):])"
