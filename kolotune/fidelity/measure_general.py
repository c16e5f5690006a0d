"""Measure a model on the general set: its loss on prose, and its greedy answers to short questions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kolotune.chats.templates.plain_text import is_plain_text
from kolotune.chats.tokens.text_encoder import begin_tokens
from kolotune.foundation.errors import TemplateError
from kolotune.foundation.typed_storage import JsonObject

from . import base_figures
from .general_figures import GeneralAnswer, GeneralFigures
from .general_set import GeneralQuestion, general_prose, general_questions
from .tasks import ComparedChat, ModelsTask
from .trained_format import TrainedFormat

if TYPE_CHECKING:
    from .measured_model import MeasuredModel

_PIECE = 256  # tokens that are read as one text: the predictions of longer ones take much memory
_LONGEST_ANSWER = 32  # tokens; what decides stands in front
_ANSWERED_TOGETHER = 16


class GeneralMeasurement:
    """Measures the base, and then the tuned model, on the same tokens.

    Args:
        task: says how much of the set is measured.
        trained: writes and tokenizes the questions, with the run's system prompt.
    """

    def __init__(self, task: ModelsTask, trained: TrainedFormat) -> None:
        self._task, self._trained = task, trained
        self._pieces = _pieces(trained, task.general_tokens)
        # A model of plain text is given no questions: it continues what it reads.
        asks = task.general_answers and not is_plain_text(trained.template.jinja)
        self._questions = general_questions() if asks else []
        self._prompts = _prompts(task, trained, self._questions)
        self._base: tuple[list[float], Sequence[list[int] | None]] = [], []

    @property
    def is_wanted(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self._pieces)

    def measure_base(self, model: MeasuredModel) -> None:
        """Measure the base, unless an earlier comparison has left its figures in the cache."""
        if not self.is_wanted:
            return
        end, task = self._trained.end_id, self._task
        file = base_figures.figures_file(task.base_sha256, self._pieces, self._prompts, end, _LONGEST_ANSWER)
        if known := base_figures.read(file):
            self._base = known.losses, known.answers
            return
        self._base = self._measure(model)
        base_figures.keep(file, *self._base)

    def measure_tuned(self, model: MeasuredModel) -> GeneralFigures | None:
        """Measure the tuned model; return the figures of both, or None where nothing is to be measured."""
        if not self.is_wanted:
            return None
        (base_losses, base_answers), (losses, answers) = self._base, self._measure(model)
        positions = [len(piece.positions) for piece in self._pieces]
        return GeneralFigures(
            tokens=sum(positions),
            base_loss=sum(base_losses) / sum(positions),
            tuned_loss=sum(losses) / sum(positions),
            error=_standard_error([tuned - base for base, tuned in zip(base_losses, losses, strict=True)], positions),
            answers=tuple(self._judged(base_answers, answers)),
        )

    def _measure(self, model: MeasuredModel) -> tuple[list[float], Sequence[list[int] | None]]:
        losses = model.losses(self._pieces)
        answers: list[list[int] | None] = [None] * len(self._prompts)
        # Prompts of like length together: they are padded to the longest.
        order = sorted(range(len(self._prompts)), key=lambda number: len(self._prompts[number]))
        for start in range(0, len(order), _ANSWERED_TOGETHER):
            group = order[start : start + _ANSWERED_TOGETHER]
            prompts = [self._prompts[number] for number in group]
            for number, answer in zip(
                group, model.answers(prompts, self._trained.end_id, _LONGEST_ANSWER), strict=True
            ):
                answers[number] = answer
        return losses, answers

    def _judged(self, base: Sequence[list[int] | None], tuned: Sequence[list[int] | None]) -> Iterator[GeneralAnswer]:
        for question, *both in zip(self._questions, base, tuned, strict=True):
            before, after = (self._trained.decode(ids) for ids in both)
            if before is not None and after is not None:
                is_right = question.rule.is_met
                yield GeneralAnswer(question.kind, question.question, before, after, is_right(before), is_right(after))


def _pieces(trained: TrainedFormat, most_tokens: int) -> list[ComparedChat]:
    """Return the prose in pieces, each as a text of its own, whose tokens but the first are predicted."""
    begin = begin_tokens(trained.tokenizer)
    ids = list(trained.tokenizer(general_prose(), add_special_tokens=False)["input_ids"])[:most_tokens]
    pieces = [[*begin, *ids[start : start + _PIECE]] for start in range(0, len(ids), _PIECE)]
    return [
        ComparedChat(piece, list(range(max(len(begin), 1) - 1, len(piece) - 1)), ends=[])
        for piece in pieces
        if len(piece) > len(begin) + 1
    ]


def _prompts(task: ModelsTask, trained: TrainedFormat, questions: Sequence[GeneralQuestion]) -> list[list[int]]:
    """Return the tokens of each question behind the run's system prompt, which some templates have no place for."""
    system: list[JsonObject] = [{"role": "system", "content": task.system}] if task.system else []
    prompts = []
    for question in questions:
        user: JsonObject = {"role": "user", "content": question.question}
        try:
            prompt = trained.prompt([*system, user], None)
        except TemplateError:
            prompt = trained.prompt([user | {"content": f"{task.system}\n{question.question}".lstrip()}], None)
        prompts.append(prompt.ids)
    return prompts


def _standard_error(changes: Sequence[float], positions: Sequence[int]) -> float | None:
    """Return the standard error of a mean over tokens, by pieces, given each piece's sum."""
    if len(changes) < 2:
        return None
    mean = sum(changes) / sum(positions)
    residuals = [change - mean * count for change, count in zip(changes, positions, strict=True)]
    count = len(changes)
    return math.sqrt(sum(each**2 for each in residuals) * count / (count - 1)) / sum(positions)
