"""Find chats that are nearly the same, or that are both trained on and held out.

Two texts are similar if they share most of their shingles (the Jaccard index of the two sets). MinHash finds in linear
time which pairs may be; the sets themselves then decide, so that no false pair is reported. Shingles that occur in
very many chats, such as those of a fixed instruction, mean nothing and do not count.

Chats are added one by one, and little is kept of each: its numbers in arrays, its shingles on disk.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO, cast

import numpy as np

from . import minhash
from .answer_variety import FEWEST_ANSWERS, AnswerVariety
from .findings import Finding, FindingKind, Part, SimilarChats
from .shingles import ChatFeatures

COMPARED = 20_000
"""The records that are searched where it must cost little; `kolotune check` searches all."""

_SIMILAR = 0.8
_FEWEST_SHINGLES = 5  # with fewer, one changed word decides
_COMMON_SHARE, _COMMON_COUNT = 0.05, 10  # a shingle in more chats than this does not count
_SLOTS = 1 << 20
_IN_MEMORY = 64 << 20
_CHATS_AT_ONCE = 512
_MOST_SETS = 1_024
_MOST_COMPARED = 4
_PHRASED_SHARE = 0.25
_QUESTION, _ANSWER, _WHOLE = range(3)


class SimilarityReport:
    """Takes chats one by one, and reports in the end how similar they are.

    In memory: some 250 bytes a chat and 30 an answer. The shingles of large data are in a temporary file, about as
    large as the text of the chats.

    Args:
        of_documents: whether these are documents: each is a question without an answer.
    """

    def __init__(self, *, of_documents: bool = False) -> None:
        self._of_documents = of_documents
        self._sources: dict[str, int] = {}
        self._source, self._line = array("H"), array("Q")
        self._held_out = array("B")
        self._question_text = array("Q")
        self._offset, self._lengths = array("Q"), (array("Q"), array("Q"))
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - it lives as long as this object
        self._answers = AnswerVariety(cast(BinaryIO, self._file), self._where)
        self._occurrences = np.zeros((2, _SLOTS), np.uint32)
        self._distinctive_of = lru_cache(_MOST_SETS)(self._distinctive)

    def add(self, chat: ChatFeatures, held_out: bool) -> None:
        """Add a chat that is trained on or held out."""
        self._source.append(self._sources.setdefault(chat.source, len(self._sources)))
        self._line.append(chat.line)
        self._held_out.append(held_out)
        self._question_text.append(chat.question)
        self._offset.append(self._file.tell())
        for kind, data in enumerate(chat.shingles):
            shingles = np.frombuffer(data, np.uint64)
            self._occurrences[kind, shingles % _SLOTS] += 1
            self._lengths[kind].append(len(shingles))
            self._file.write(data)
        for answer in chat.answers:
            self._answers.add(answer, len(self._line) - 1)

    def findings(self) -> list[Finding]:
        """Return what is striking about the chats, the most serious first."""
        bands, phrased = self._bands()
        similar = self._leaks(bands), self._near_duplicates(bands[_WHOLE])
        if self._of_documents:
            self._file.close()
            return [finding for finding in similar if finding is not None]
        answers = self._answers.findings()
        findings = [*(finding for finding in similar if finding is not None), *answers]
        if not any(finding.kind in (FindingKind.SAME_ANSWERS, FindingKind.SAME_OPENINGS) for finding in answers):
            findings += self._phrased_alike(phrased)
        self._file.close()
        return findings

    def _where(self, index: int) -> str:
        return f"{list(self._sources)[self._source[index]]}:{self._line[index]}"

    def _distinctive(self, index: int, kind: int) -> frozenset[int]:
        """Return the shingles of a chat that few other chats have."""
        questions, answers = self._lengths[_QUESTION][index], self._lengths[_ANSWER][index]
        self._file.seek(self._offset[index])
        shingles = np.frombuffer(self._file.read(8 * (questions + answers)), np.uint64)
        slots = shingles % _SLOTS
        occurrences = np.concatenate(
            (self._occurrences[_QUESTION, slots[:questions]], self._occurrences[_ANSWER, slots[questions:]])
        )
        distinctive = occurrences <= self._too_common
        distinctive[: questions * (kind == _ANSWER)] = False
        distinctive[questions + answers * (kind != _QUESTION) :] = False
        return frozenset(shingles[distinctive].tolist())

    @property
    def _too_common(self) -> int:
        return max(_COMMON_COUNT, int(_COMMON_SHARE * len(self._line)))

    def _bands(self) -> tuple[list[np.ndarray], list[int]]:
        """Compute the bands of all chats.

        Returns:
            For questions, answers and whole chats the bands of each, 0 where it is too short to be compared; and the
            chats whose answers are mostly common shingles.
        """
        factors = minhash.factors()
        bands = [np.zeros((len(self._line), minhash.BANDS), np.uint32) for _ in range(3)]
        phrased: list[int] = []
        for start in range(0, len(self._line), _CHATS_AT_ONCE):
            chosen = range(start, min(start + _CHATS_AT_ONCE, len(self._line)))
            lengths, shingles = self._shingles_of(chosen)
            kinds = np.tile((_QUESTION, _ANSWER), len(chosen)).repeat(lengths)
            distinctive = self._occurrences[kinds, shingles % _SLOTS] <= self._too_common
            sizes = np.add.reduceat(np.append(distinctive, 0), minhash.starts(lengths)) * (lengths > 0)
            signatures = minhash.signatures(shingles[distinctive], sizes, factors)
            per_chat, parts = sizes.reshape(-1, 2), signatures.reshape(len(chosen), 2, -1)
            for kind, signature, size in (
                (_QUESTION, parts[:, 0], per_chat[:, 0]),
                (_ANSWER, parts[:, 1], per_chat[:, 1]),
                (_WHOLE, parts.min(axis=1), per_chat.sum(axis=1)),
            ):
                bands[kind][chosen] = minhash.bands(signature) * (size >= _FEWEST_SHINGLES)[:, None]
            total = lengths.reshape(-1, 2)[:, 1]
            common = (total >= 2 * _FEWEST_SHINGLES) & (4 * per_chat[:, 1] < total)
            phrased += (start + np.flatnonzero(common)).tolist()
        return bands, phrased

    def _shingles_of(self, chosen: range) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of shingles of each chat's question and answer, alternating; and the shingles."""
        lengths = np.array([self._lengths[kind][index] for index in chosen for kind in (_QUESTION, _ANSWER)], np.int64)
        data = []
        for number, index in enumerate(chosen):
            self._file.seek(self._offset[index])
            data.append(self._file.read(8 * int(lengths[2 * number] + lengths[2 * number + 1])))
        return lengths, np.frombuffer(b"".join(data), np.uint64)

    def _similarity(self, kind: int, one: int, other: int) -> float:
        """Return the exact Jaccard index of two chats' shingles."""
        a, b = self._distinctive_of(one, kind), self._distinctive_of(other, kind)
        both = len(a & b)
        return both / max(1, len(a) + len(b) - both)

    def _near_duplicates(self, bands: np.ndarray) -> Finding | None:
        """Find training chats that are nearly an earlier one. Each is compared with few: the time stays linear."""
        similar: dict[int, SimilarChats] = {}
        compared: set[tuple[int, int]] = set()
        for bucket in minhash.buckets(bands):
            members = [index for index in bucket if not self._held_out[index]]
            for number, later in enumerate(members[1:], 1):
                for earlier in dict.fromkeys((members[0], members[number - 1])):
                    if later in similar or (earlier, later) in compared:
                        continue
                    compared.add((earlier, later))
                    share = self._similarity(_WHOLE, earlier, later)
                    if share >= _SIMILAR:
                        similar[later] = SimilarChats(self._where(later), self._where(earlier), Part.WHOLE, share)
        kind = FindingKind.NEAR_DUPLICATES_OF_TEXT if self._of_documents else FindingKind.NEAR_DUPLICATES
        return self._similar_chats(kind, similar)

    def _leaks(self, bands: Sequence[np.ndarray]) -> Finding | None:
        """Find held-out chats whose question or answer is trained on."""
        similar: dict[int, SimilarChats] = {}
        asked = Part.WHOLE if self._of_documents else Part.QUESTION
        trained = {
            text: index
            for index, text in reversed(list(enumerate(self._question_text)))
            if text and not self._held_out[index]
        }
        for index, text in enumerate(self._question_text):
            if self._held_out[index] and text in trained:
                similar[index] = SimilarChats(self._where(index), self._where(trained[text]), asked, 1)
        for kind, part in ((_QUESTION, asked), (_ANSWER, Part.ANSWER)):
            for bucket in minhash.buckets(bands[kind]):
                earlier = [index for index in bucket if not self._held_out[index]][:_MOST_COMPARED]
                for index in bucket:
                    if not self._held_out[index] or index in similar:
                        continue
                    shares = ((self._similarity(kind, index, trained_on), trained_on) for trained_on in earlier)
                    share, nearest = max(shares, default=(0.0, 0))
                    if share >= _SIMILAR:
                        similar[index] = SimilarChats(self._where(index), self._where(nearest), part, share)
        finding = FindingKind.LEAKS_OF_TEXT if self._of_documents else FindingKind.LEAKS
        return self._similar_chats(finding, similar)

    def _similar_chats(self, kind: FindingKind, similar: dict[int, SimilarChats]) -> Finding | None:
        if not similar:
            return None
        return Finding(kind, len(similar), len(self._line), where=tuple(similar[index] for index in sorted(similar)))

    def _phrased_alike(self, phrased: list[int]) -> list[Finding]:
        total = len(self._line)
        if total < FEWEST_ANSWERS or len(phrased) < _PHRASED_SHARE * total:
            return []
        return [Finding(FindingKind.PHRASED_ALIKE, len(phrased), total, where=tuple(map(self._where, phrased)))]
