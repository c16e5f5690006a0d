"""The general set: prose and short questions that have nothing to do with a run's chats, to measure what it forgets.

Both ship with kolotune and were written for it. An answer is right by a rule, never by another model's opinion.
"""

from __future__ import annotations

import importlib.resources
import re
from dataclasses import dataclass, field

from kolotune.foundation import typed_storage
from kolotune.foundation.typed_storage import JsonObject

_FOLDER, _QUESTIONS, _PROSE = "general", "questions.jsonl", "prose.txt"
_FENCE = re.compile(r"^```\w*\n|\n?```$")


@dataclass(frozen=True)
class AnswerRule:
    """What makes an answer right; everything that is given has to hold. Upper and lower case are the same for words.

    Attributes:
        any: one of these words or phrases is in it.
        has: all of these texts are in it, written exactly so.
        without: this text is not in it.
        only: the answer is one of these and nothing else but punctuation.
        starts: it begins with this text.
        last: the last number in it.
        words, lines: the most words, and the exact number of lines that are not empty.
        each: every line begins with this.
        order: these words are in it, in this order.
        json: it is this JSON object, with or without a fence of Markdown around it.
    """

    any: tuple[str, ...] = ()
    has: tuple[str, ...] = ()
    without: str = ""
    only: tuple[str, ...] = ()
    starts: str = ""
    last: str = ""
    words: int = 0
    lines: int = 0
    each: str = ""
    order: tuple[str, ...] = ()
    json: JsonObject | None = None

    def is_met(self, answer: str) -> bool:
        """Return whether an answer is right."""
        text = answer.strip()
        lowered = text.lower()
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        places = [lowered.find(word) for word in self.order]
        return bool(text) and all(
            (
                not self.any or any(_has_word(lowered, word.lower()) for word in self.any),
                all(part in text for part in self.has),
                not self.without or self.without not in lowered,
                not self.only or _bare(text) in map(_bare, self.only),
                text.startswith(self.starts),
                not self.last or re.findall(r"\d+", text)[-1:] == [self.last],
                not self.words or len(text.split()) <= self.words,
                not self.lines or len(lines) == self.lines,
                all(line.startswith(self.each) for line in lines),
                -1 not in places and places == sorted(places),
                self.json is None or _json_object(text) == self.json,
            )
        )


@dataclass(frozen=True)
class GeneralQuestion:
    """A question of the set.

    Attributes:
        kind: "facts", "arithmetic", "formats" or "instructions".
        question: the user's turn.
        rule: what makes an answer right.
    """

    kind: str
    question: str
    rule: AnswerRule = field(default_factory=AnswerRule)


def general_questions() -> list[GeneralQuestion]:
    """Return the questions."""
    return [typed_storage.parse(GeneralQuestion, line) for line in _read(_QUESTIONS).splitlines()]


def general_prose() -> str:
    """Return the prose, some 4,000 tokens."""
    return _read(_PROSE)


def _read(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(_FOLDER, name).read_text(encoding="utf-8")


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


def _bare(text: str) -> str:
    return re.sub(r"[^\w+=-]+", " ", text.lower()).strip()


def _json_object(text: str) -> JsonObject | None:
    try:
        return typed_storage.parse_object(_FENCE.sub("", text))
    except typed_storage.StorageError:
        return None
