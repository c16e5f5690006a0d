"""Findings about the chats as a whole: what they are, and their sentences."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class FindingKind(StrEnum):
    """What the user should look at. The values are names in the record of the prepare stage."""

    LEAKS = "leaks"
    NEAR_DUPLICATES = "near_duplicates"
    SAME_ANSWERS = "same_answers"
    SAME_OPENINGS = "same_openings"
    FEW_ANSWERS = "few_answers"
    PHRASED_ALIKE = "phrased_alike"
    LEAKS_OF_TEXT = "leaks_of_text"
    NEAR_DUPLICATES_OF_TEXT = "near_duplicates_of_text"


class Part(StrEnum):
    """The part of two chats that is similar."""

    QUESTION = "asks"
    ANSWER = "answers"
    WHOLE = "is"


@dataclass(frozen=True)
class SimilarChats:
    """Two chats that are similar.

    Attributes:
        location: ``file:line`` of one.
        earlier: ``file:line`` of the chat that it is compared with.
        part: The part that is similar.
        share: The share of shingles that the two have in common.
    """

    location: str
    earlier: str
    part: Part
    share: float

    def __str__(self) -> str:
        if self.part == Part.WHOLE:
            return f"{self.location} is nearly {self.earlier} ({self.share:.0%})"
        same = "the same as" if self.share == 1 else f"nearly the same ({self.share:.0%}) as"
        return f"{self.location} {self.part} {same} {self.earlier}"


_SENTENCES = {
    FindingKind.LEAKS: "held-out chats whose question or answer is trained on, or nearly: {count}; the held-out loss "
    "will look better than it is, so keep such chats on one side only",
    FindingKind.NEAR_DUPLICATES: "training chats that are nearly the same as an earlier one: {count}; they count "
    "double in training, so keep one of each",
    FindingKind.FEW_ANSWERS: "there are only {count} different answers in {total}: right for a model that sorts or "
    "rates; otherwise add chats with other answers",
    FindingKind.SAME_ANSWERS: "{count} of {total} answers ({share}) are the same, “{example}”: the model will tend to "
    "give this answer always; remove most of them, unless that is what it should learn",
    FindingKind.SAME_OPENINGS: "{count} of {total} answers ({share}) start with the same words, as “{example}”: the "
    "model will always start like this; vary them, unless that is what it should learn",
    FindingKind.LEAKS_OF_TEXT: "held-out documents that are trained on, or nearly: {count}; the held-out loss will "
    "look better than it is, so keep such documents on one side only",
    FindingKind.NEAR_DUPLICATES_OF_TEXT: "training documents that are nearly the same as an earlier one: {count}; they "
    "count double in training, so keep one of each",
    FindingKind.PHRASED_ALIKE: "the answers of {count} of {total} chats consist almost entirely of the same phrases: "
    "the model will repeat them; add chats with other answers",
}


@dataclass(frozen=True)
class Finding:
    """Something about the chats as a whole that the user should look at.

    Attributes:
        kind: What it is.
        count: The number of chats or answers that it is about.
        total: The number of all chats or answers.
        example: The start of an answer, or "".
        where: The chats that it is about.
    """

    kind: FindingKind
    count: int
    total: int
    example: str = ""
    where: tuple[SimilarChats | str, ...] = ()

    @property
    def locations(self) -> tuple[str, ...]:
        """The chats that it is about, each as a line of text."""
        return tuple(map(str, self.where))

    @property
    def text(self) -> str:
        """What it is and what to do, as a sentence."""
        share = f"{self.count / max(1, self.total):.0%}"
        return _SENTENCES[self.kind].format(count=self.count, total=self.total, share=share, example=self.example)
