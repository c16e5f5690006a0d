"""Count answers that are equal or start alike: a model trained on them gives little else."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from ..reading.printable import printable
from .findings import Finding, FindingKind
from .shingles import SHOWN_CHARACTERS, AnswerFeatures

FEWEST_ANSWERS = 20
"""Fewer, as in a test, are not judged."""
_SAME_SHARE, _OPENING_SHARE, _VARIETY = 0.1, 0.25, 0.05


class AnswerVariety:
    """Counts answers, some 30 bytes in memory each.

    Args:
        file: Receives the first words of each answer.
        where: Returns ``file:line`` of a chat.
    """

    def __init__(self, file: BinaryIO, where: Callable[[int], str]) -> None:
        self._file, self._where = file, where
        self._text, self._opening = array("Q"), array("Q")
        self._chat, self._offset = array("Q"), array("Q")

    def add(self, answer: AnswerFeatures, chat: int) -> None:
        """Add an answer of a chat."""
        self._text.append(answer.text)
        self._opening.append(answer.opening)
        self._chat.append(chat)
        self._offset.append(self._file.tell())
        # The space keeps it from being empty; the end of the line is the end of the text.
        self._file.write(f" {answer.start}\n".encode("utf-8", "replace"))

    def findings(self) -> list[Finding]:
        """Return what is striking about the answers."""
        total = len(self._text)
        if total < FEWEST_ANSWERS:
            return []
        findings: list[Finding] = []
        texts = np.array(self._text, np.uint64)
        different = len(np.unique(texts))
        first, count = _most_frequent(texts)
        if different <= max(2, _VARIETY * total):
            findings.append(Finding(FindingKind.FEW_ANSWERS, different, total))
        elif count >= max(3, _SAME_SHARE * total):
            where = self._locations(texts, first)
            findings.append(Finding(FindingKind.SAME_ANSWERS, count, total, self._start(first), where))
        openings = np.array(self._opening, np.uint64)
        first, count = _most_frequent(openings[openings != 0]) if openings.any() else (0, 0)
        if count >= max(3, _OPENING_SHARE * total) and not findings:
            first = int(np.flatnonzero(openings != 0)[first])
            where = self._locations(openings, first)
            findings.append(Finding(FindingKind.SAME_OPENINGS, count, total, self._start(first), where))
        return findings

    def _start(self, index: int) -> str:
        self._file.seek(self._offset[index])
        return printable(self._file.readline().decode("utf-8", "replace").strip(), SHOWN_CHARACTERS)

    def _locations(self, values: np.ndarray, index: int) -> tuple[str, ...]:
        """Return the chats of all answers that have the same value as this one."""
        return tuple(self._where(self._chat[each]) for each in np.flatnonzero(values == values[index]).tolist())


def _most_frequent(values: np.ndarray) -> tuple[int, int]:
    """Return where the most frequent value first occurs, and how often it does."""
    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    most = int(counts.argmax())
    return int(first[most]), int(counts[most])
