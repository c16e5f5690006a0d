"""Which chats are nearly the same, stand on both sides of the split, or give all the same answer.

Chats are added one by one, and what is kept of each is small: its numbers in arrays, its phrases on the disk. A
phrase is three words in a row. Two texts are alike when they share most of their phrases (Jaccard's measure of the two
sets); MinHash finds in linear time which pairs could be, and the sets themselves then decide, so that nothing is told
that is not so. Phrases that stand in very many chats, as those of a fixed instruction, mean nothing and do not count.

The bands are sorted columns of numbers, not tables of a library, which need several times the memory (datasketch: 2.5
KB a chat).
"""

from __future__ import annotations

import re
import tempfile
import unicodedata
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..chat import Chat
from ..reading.printable import printable

if TYPE_CHECKING:
    import numpy as np

COMPARED = 20_000
"""So many records of the data are compared where it must cost little; `kolotune check` compares all."""

_ALIKE = 0.8
_PHRASE = 3
_FEWEST_PHRASES = 5  # of fewer, one changed word decides
_COMMON_SHARE, _COMMON_COUNT = 0.05, 10  # a phrase in more chats than these says nothing of likeness
_SLOTS = 1 << 20
_BANDS, _ROWS = 16, 5  # finds of pairs that share 80% of their phrases 998 in 1000
_IN_MEMORY = 64 << 20
_AT_ONCE = 512  # chats
_KEPT = 1_024  # sets of phrases
_TRIED = 4
_FEWEST_ANSWERS = 20
_SAME_SHARE, _OPENING_SHARE, _VARIETY, _PHRASED_SHARE = 0.1, 0.25, 0.05, 0.25
_OPENING = 4
_SHOWN_TEXT = 60
_QUESTION, _ANSWER, _WHOLE = range(3)
# Scripts without spaces between words: every character counts as one.
_WORD = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\\W_]+")


@dataclass(frozen=True)
class Finding:
    """Something about the chats as a whole that the user should look at.

    Attributes:
        kind: "leaks", "near_duplicates", "same_answers", "same_openings", "few_answers" or "phrased_alike".
        count: how many chats or answers it is about.
        text: what it is and what to do.
        places: where they stand.
    """

    kind: str
    count: int
    text: str
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """What is compared of a chat.

    Attributes:
        source, line: where the chat stands.
        question: stands for the text of its questions; 0 when it is too short.
        phrases: of its questions, and of its answers: uint64, sorted, each once.
        answers: of each answer its first words, a number for the text, and one for its beginning (0: too short).
    """

    source: str
    line: int
    question: int
    phrases: tuple[np.ndarray, np.ndarray]
    answers: tuple[tuple[str, int, int], ...]

    @classmethod
    def at(cls, chat: Chat) -> Look:
        """The look of a chat."""
        answers = [(turn.content, _words(turn.content)) for turn in chat.messages if turn.role == "assistant"]
        asked = _words("\n".join(turn.content for turn in chat.messages if turn.role in ("user", "tool")))
        calls = _words("\n".join(str(call.get("function")) for turn in chat.messages for call in turn.tool_calls))
        answered = [*(word for _, words in answers for word in words), *calls]
        return cls(
            str(chat.source),
            chat.line,
            _digest(asked) if len(asked) >= _PHRASE else 0,
            (_phrases(asked), _phrases(answered)),
            tuple(
                (
                    " ".join(text[: 2 * _SHOWN_TEXT].split()),
                    _digest(words),
                    _digest(words[:_OPENING]) if len(words) > _OPENING else 0,
                )
                for text, words in answers
                if words
            ),
        )


class Likeness:
    """Takes chats one by one and tells in the end how alike they are.

    In memory: some 250 bytes a chat and 30 an answer. The phrases of large data are in a temporary file, about as
    large as the chats' text.
    """

    def __init__(self) -> None:
        import numpy as np

        self._sources: dict[str, int] = {}
        self._source, self._line = array("H"), array("Q")
        self._held_out = array("B")
        self._question_text = array("Q")
        self._offset, self._lengths = array("Q"), (array("Q"), array("Q"))
        self._answers = _Answers()
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - it lives as long as this object
        self._common = np.zeros((2, _SLOTS), np.uint32)
        self._telling_of = lru_cache(_KEPT)(self._telling)

    def add(self, seen: Look, held_out: bool) -> None:
        """Takes a chat of the training part or the held-out one."""
        self._source.append(self._sources.setdefault(seen.source, len(self._sources)))
        self._line.append(seen.line)
        self._held_out.append(held_out)
        self._question_text.append(seen.question)
        self._offset.append(self._file.tell())
        for kind, phrases in enumerate(seen.phrases):
            self._common[kind, phrases % _SLOTS] += 1
            self._lengths[kind].append(len(phrases))
            self._file.write(phrases.tobytes())
        for answer in seen.answers:
            self._answers.add(answer, len(self._line) - 1, self._file)

    def findings(self) -> list[Finding]:
        """What there is to tell, the gravest first; empty when there is nothing."""
        bands, phrased = self._bands()
        found = [self._leaks(bands), self._near_duplicates(bands[_WHOLE])]
        found += self._answers.findings(self._where, self._file)
        if not any(each and each.kind.startswith("same_") for each in found):
            found.append(self._phrased_alike(phrased))
        self._file.close()
        return [each for each in found if each is not None]

    def _where(self, index: int) -> str:
        return f"{list(self._sources)[self._source[index]]}:{self._line[index]}"

    def _telling(self, index: int, kind: int) -> frozenset[int]:
        """The phrases of a chat that not many others have."""
        import numpy as np

        questions, answers = self._lengths[_QUESTION][index], self._lengths[_ANSWER][index]
        self._file.seek(self._offset[index])
        phrases = np.frombuffer(self._file.read(8 * (questions + answers)), np.uint64)
        slots = phrases % _SLOTS
        telling = np.concatenate((self._common[_QUESTION, slots[:questions]], self._common[_ANSWER, slots[questions:]]))
        telling = telling <= self._too_common
        telling[: questions * (kind == _ANSWER)] = False
        telling[questions + answers * (kind != _QUESTION) :] = False
        return frozenset(phrases[telling].tolist())

    @property
    def _too_common(self) -> int:
        return max(_COMMON_COUNT, int(_COMMON_SHARE * len(self._line)))

    def _bands(self) -> tuple[list[np.ndarray], list[int]]:
        """For questions, answers and whole chats the bands of each, 0 where it is too short to be compared.

        Also the chats whose answers are mostly common phrases.
        """
        import numpy as np

        factors = np.random.default_rng(0).integers(0, 2**63, _BANDS * _ROWS, dtype=np.uint64) * 2 + 1
        bands = [np.zeros((len(self._line), _BANDS), np.uint32) for _ in range(3)]
        phrased: list[int] = []
        for start in range(0, len(self._line), _AT_ONCE):
            chosen = range(start, min(start + _AT_ONCE, len(self._line)))
            lengths, phrases = self._phrases_of(chosen)
            kinds = np.tile((_QUESTION, _ANSWER), len(chosen)).repeat(lengths)
            telling = self._common[kinds, phrases % _SLOTS] <= self._too_common
            sizes = np.add.reduceat(np.append(telling, 0), _starts(lengths)) * (lengths > 0)
            signatures = _signatures(phrases[telling], sizes, factors)
            per_chat, parts = sizes.reshape(-1, 2), signatures.reshape(len(chosen), 2, -1)
            for kind, (signature, size) in enumerate(
                (
                    (parts[:, 0], per_chat[:, 0]),
                    (parts[:, 1], per_chat[:, 1]),
                    (parts.min(axis=1), per_chat.sum(axis=1)),
                )
            ):
                bands[kind][chosen] = _banded(signature) * (size >= _FEWEST_PHRASES)[:, None]
            total = lengths.reshape(-1, 2)[:, 1]
            common = (total >= 2 * _FEWEST_PHRASES) & (4 * per_chat[:, 1] < total)
            phrased += (start + np.flatnonzero(common)).tolist()
        return bands, phrased

    def _phrases_of(self, chosen: range) -> tuple[np.ndarray, np.ndarray]:
        """How many phrases the question and the answer of each of these chats have, in turns; and the phrases."""
        import numpy as np

        lengths = np.array([self._lengths[kind][index] for index in chosen for kind in (_QUESTION, _ANSWER)], np.int64)
        data = []
        for at, index in enumerate(chosen):
            self._file.seek(self._offset[index])
            data.append(self._file.read(8 * int(lengths[2 * at] + lengths[2 * at + 1])))
        return lengths, np.frombuffer(b"".join(data), np.uint64)

    def _likeness(self, kind: int, one: int, other: int) -> float:
        """Jaccard's measure of two chats' phrases, exactly."""
        a, b = self._telling_of(one, kind), self._telling_of(other, kind)
        both = len(a & b)
        return both / max(1, len(a) + len(b) - both)

    def _near_duplicates(self, bands: np.ndarray) -> Finding | None:
        """Training chats that are nearly an earlier one. Each is held against few others: the time stays linear."""
        told: dict[int, str] = {}
        tried: set[tuple[int, int]] = set()
        for bucket in _buckets(bands):
            members = [index for index in bucket if not self._held_out[index]]
            for at, later in enumerate(members[1:], 1):
                for earlier in dict.fromkeys((members[0], members[at - 1])):
                    if later in told or (earlier, later) in tried:
                        continue
                    tried.add((earlier, later))
                    share = self._likeness(_WHOLE, earlier, later)
                    if share >= _ALIKE:
                        told[later] = f"{self._where(later)} is nearly {self._where(earlier)} ({share:.0%})"
        if not told:
            return None
        are, count = ("is", "counts") if len(told) == 1 else ("are", "count")
        text = f"{_chats(len(told))} {are} nearly the same as another and {count} double in training; keep one of each"
        return Finding("near_duplicates", len(told), text, tuple(told[index] for index in sorted(told)))

    def _leaks(self, bands: Sequence[np.ndarray]) -> Finding | None:
        """Held-out chats whose question or answer is trained on."""
        told: dict[int, str] = {}
        trained = {
            text: index
            for index, text in reversed(list(enumerate(self._question_text)))
            if text and not self._held_out[index]
        }
        for index, asked in enumerate(self._question_text):
            if self._held_out[index] and asked in trained:
                told[index] = f"{self._where(index)} asks the same as {self._where(trained[asked])}"
        for kind, verb in ((_QUESTION, "asks"), (_ANSWER, "answers")):
            for bucket in _buckets(bands[kind]):
                earlier = [index for index in bucket if not self._held_out[index]][:_TRIED]
                for index in (each for each in bucket if self._held_out[each] and each not in told):
                    share, near = max(((self._likeness(kind, index, each), each) for each in earlier), default=(0.0, 0))
                    if share >= _ALIKE:
                        how = "the same as" if share == 1 else f"nearly the same ({share:.0%}) as"
                        told[index] = f"{self._where(index)} {verb} {how} {self._where(near)}"
        if not told:
            return None
        text = (
            f"of {_chats(len(told), 'held-out chat')} the question or the answer is trained on, or nearly: the "
            "held-out loss will look better than it is; keep such chats on one side only"
        )
        return Finding("leaks", len(told), text, tuple(told[index] for index in sorted(told)))

    def _phrased_alike(self, phrased: list[int]) -> Finding | None:
        if len(self._line) < _FEWEST_ANSWERS or len(phrased) < _PHRASED_SHARE * len(self._line):
            return None
        text = (
            f"the answers of {len(phrased)} of {len(self._line)} chats consist almost wholly of the same phrases: "
            "the model will repeat them; add chats with other answers"
        )
        return Finding("phrased_alike", len(phrased), text, tuple(self._where(index) for index in phrased))


class _Answers:
    """What is counted of answers: the whole text, and its beginning."""

    def __init__(self) -> None:
        self._text, self._opening = array("Q"), array("Q")
        self._chat, self._offset = array("Q"), array("Q")

    def add(self, answer: tuple[str, int, int], chat: int, file: Any) -> None:
        start, text, opening = answer
        self._text.append(text)
        self._opening.append(opening)
        self._chat.append(chat)
        self._offset.append(file.tell())
        # The space keeps it from being empty; the end of the line is the end of the text.
        file.write(f" {start}\n".encode("utf-8", "replace"))

    def findings(self, where: Any, file: Any) -> list[Finding | None]:
        """What there is to tell of them; few answers, as in a test, say nothing."""
        import numpy as np

        total = len(self._text)
        if total < _FEWEST_ANSWERS:
            return []

        def shown(index: int) -> str:
            file.seek(self._offset[index])
            return printable(file.readline().decode("utf-8", "replace").strip(), _SHOWN_TEXT)

        found: list[Finding | None] = []
        texts = np.array(self._text, np.uint64)
        different = len(np.unique(texts))
        same, count = _most_frequent(texts)
        if different <= max(2, _VARIETY * total):
            text = (
                f"there are {different} different answers in {total}: right for a model that sorts or rates; "
                "else add chats with other answers"
            )
            found.append(Finding("few_answers", different, text))
        elif count >= max(3, _SAME_SHARE * total):
            text = (
                f"{count} of {total} answers ({count / total:.0%}) are the same, “{shown(same)}”: the model will "
                "tend to say it always; leave most of them out, unless that is what it should learn"
            )
            found.append(Finding("same_answers", count, text, self._places(texts, same, where)))
        openings = np.array(self._opening, np.uint64)
        same, count = _most_frequent(openings[openings != 0]) if openings.any() else (0, 0)
        if count >= max(3, _OPENING_SHARE * total) and not found:
            same = int(np.flatnonzero(openings != 0)[same])
            text = (
                f"{count} of {total} answers ({count / total:.0%}) begin with the same words, as “{shown(same)}”: the "
                "model will begin so always; vary them, unless that is what it should learn"
            )
            found.append(Finding("same_openings", count, text, self._places(openings, same, where)))
        return found

    def _places(self, values: np.ndarray, like: int, where: Any) -> tuple[str, ...]:
        import numpy as np

        return tuple(where(self._chat[index]) for index in np.flatnonzero(values == values[like]).tolist())


def _words(text: str) -> list[str]:
    """The words without case, punctuation and the different spellings of one character."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


def _digest(words: list[str]) -> int:
    """64 bits that stand for a text; never 0."""
    data = " ".join(words).encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.adler32(data) | 1


def _phrases(words: list[str]) -> np.ndarray:
    """A text's phrases, each as 64 bits, sorted and each once."""
    import numpy as np

    hashes = np.fromiter(
        (zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, count=len(words)
    )
    if len(hashes) < _PHRASE:
        hashes = np.pad(hashes, (0, _PHRASE - len(hashes))) if len(hashes) else hashes
    mixed = np.zeros(max(0, len(hashes) - _PHRASE + 1), np.uint64)
    for at in range(_PHRASE):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + hashes[at : at + len(mixed)]
    mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    return np.unique(mixed ^ mixed >> np.uint64(32))


def _signatures(phrases: np.ndarray, sizes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """MinHash: for each factor the lowest of all phrases of a text multiplied by it (their upper 32 bits).

    Args:
        phrases: those of all texts, one after another.
        sizes: how many each text has.
        factors: odd numbers.

    Returns:
        uint32 ``[texts, factors]``; the highest number where a text has none.
    """
    import numpy as np

    out = np.full((len(sizes), len(factors)), 0xFFFFFFFF, np.uint32)
    if len(phrases):
        starts, filled = _starts(sizes), sizes > 0
        for column, factor in enumerate(factors):
            hashed = (phrases * factor >> np.uint64(32)).astype(np.uint32)
            out[filled, column] = np.minimum.reduceat(hashed, starts[filled])
    return out


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of several parts of these sizes begins."""
    import numpy as np

    return np.concatenate(([0], np.cumsum(sizes)[:-1]))


def _banded(signatures: np.ndarray) -> np.ndarray:
    """Each band of the signatures as 32 bits that are not 0; chats that are alike are likely to have one in common."""
    import numpy as np

    mixed = np.zeros((len(signatures), _BANDS), np.uint64)
    for row in range(_ROWS):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + signatures[:, row::_ROWS]
    return (mixed >> np.uint64(32) | np.uint64(1)).astype(np.uint32)


def _buckets(bands: np.ndarray) -> Iterator[list[int]]:
    """Groups of chats that have a band in common, each group in rising order."""
    import numpy as np

    for band in bands.T:
        order = np.argsort(band, kind="stable")
        order = order[band[order] != 0]
        values = band[order]
        ends = np.flatnonzero(np.diff(values)) + 1
        starts = np.concatenate(([0], ends))
        sizes = np.diff(np.concatenate((starts, [len(order)])))
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            yield order[start : start + size].tolist()


def _most_frequent(values: np.ndarray) -> tuple[int, int]:
    """Where the most frequent value first stands, and how often it does."""
    import numpy as np

    _, first, counts = np.unique(values, return_index=True, return_counts=True)
    most = int(counts.argmax())
    return int(first[most]), int(counts[most])


def _chats(count: int, name: str = "chat") -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
