"""What a model can do in general, before and after training, as a comparison stores it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GeneralAnswer:
    """The most likely answers to a question of the general set.

    Attributes:
        kind: "facts", "arithmetic", "formats" or "instructions".
        question: the question.
        base, tuned: the answers of the two models; long ones are cut.
        base_right, tuned_right: whether they meet the question's rule.
    """

    kind: str
    question: str
    base: str
    tuned: str
    base_right: bool
    tuned_right: bool


@dataclass(frozen=True)
class GeneralFigures:
    """What training took from the model, on texts and questions that have nothing to do with the chats.

    Attributes:
        tokens: tokens of prose that were predicted.
        base_loss, tuned_loss: means over them, in nats.
        error: standard error of the difference of the two; None: one piece of prose.
        answers: all questions; empty where none was asked.
    """

    tokens: int
    base_loss: float
    tuned_loss: float
    error: float | None
    answers: tuple[GeneralAnswer, ...] = ()

    def right(self, kind: str = "") -> tuple[int, int, int]:
        """Return how many questions of a kind, or of all, base and tuned model answer rightly, of how many."""
        chosen = [answer for answer in self.answers if kind in ("", answer.kind)]
        return sum(each.base_right for each in chosen), sum(each.tuned_right for each in chosen), len(chosen)

    @property
    def kinds(self) -> list[str]:
        """The kinds of the questions."""
        return list(dict.fromkeys(answer.kind for answer in self.answers))
