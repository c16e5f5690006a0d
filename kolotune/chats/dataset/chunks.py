"""One step of preparing: some records of a file, read, checked and encoded. Runs in worker processes too."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kolotune.foundation.errors import DataError, TemplateError

from ..chat import Chat
from ..reading.faults import Fault, FaultKind, Problem
from ..reading.files import read_chat
from ..reading.records import AnyRecord, RawRecord
from ..tokens.encoded_chat import EncodedChat
from ..tokens.encoder import Encoder
from .holdout import is_held_out
from .near_duplicates import Look

_RECORDS = 512
_BYTES = 256 << 10

USED, TOO_LONG, REFUSED = range(3)
SPECIAL, MERGED, HELD_OUT = 1, 2, 4
COLUMNS = (
    ("hash", "<u8"), ("hash_too", "<u8"), ("line", "<u8"), ("source", "<u4"), ("turns", "<u4"), ("state", "u1"),
    ("flags", "u1"), ("tokens", "<u4"), ("record", "<u4"), ("look", "<u4"),
)  # fmt: skip
"""What is kept of each chat as a row of numbers: 16 bytes of its hash; where it stands; how many turns were
left out; whether it is used; what it has; and how long its parts in the other columns are."""


@dataclass(frozen=True)
class Chunk:
    """Some records of a file.

    Attributes:
        source: the number of the file; `path`: its path.
        share: the share of its chats that is held out.
        records: the records.
        compared: of how many, the first ones, that is kept which is compared.
    """

    source: int
    path: Path
    share: float
    records: list[AnyRecord]
    compared: int


@dataclass
class Outcome:
    """What became of a chunk.

    Attributes:
        source: the number of its file.
        shapes: how many of each shape.
        problems: of records that are no chats.
        rows: for each chat a row of `COLUMNS`.
        ids: the tokens of all used chats, as int32 in memory; `labelled`: a byte for each of them.
        records: of chats that may be held out, as lines of JSON; `looks`: pickled, of those that are compared.
        refused: problems of chats, by their number in the chunk.
        lowest: the lowest hash, and its chat's number in the chunk; None without chats.
    """

    source: int
    shapes: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    ids: bytearray = field(default_factory=bytearray)
    labelled: bytearray = field(default_factory=bytearray)
    records: list[bytes] = field(default_factory=list)
    looks: list[bytes] = field(default_factory=list)
    refused: dict[int, Problem] = field(default_factory=dict)
    lowest: tuple[bytes, int] | None = None


def chunks(source: int, path: Path, share: float, records: Iterable[AnyRecord], compared: int) -> Iterator[Chunk]:
    """The records of a file in parts of bounded size; the first `compared` of them are compared."""
    part: list[AnyRecord] = []
    size = 0
    for record in records:
        part.append(record)
        size += len(record.data) if isinstance(record, RawRecord) else 0
        if len(part) >= _RECORDS or size >= _BYTES:
            yield Chunk(source, path, share, part, compared)
            compared = max(0, compared - len(part))
            part, size = [], 0
    if part:
        yield Chunk(source, path, share, part, compared)


@dataclass(frozen=True)
class _Kept:
    """A chat's number and hash, what the hash says, and whether its text and its look are kept."""

    number: int
    digest: bytes
    held_out: bool
    record: bool
    look: bool


@dataclass(frozen=True)
class Work:
    """Reads and encodes chunks.

    Attributes:
        encoder: what makes tokens.
        longest: the most tokens of a chat.
    """

    encoder: Encoder
    longest: int

    def __call__(self, chunk: Chunk) -> Outcome:
        out = Outcome(chunk.source)
        chats: list[Chat] = []
        compared = 0
        for number, record in enumerate(chunk.records):
            shape, chat = read_chat(chunk.path, record)
            out.shapes[shape] += bool(shape)
            if isinstance(chat, Chat):
                chats.append(chat)
                compared += number < chunk.compared
            else:
                out.problems += chat
        digests = [chat.content_hash() for chat in chats]
        if digests:
            lowest = min(range(len(digests)), key=digests.__getitem__)
            out.lowest = digests[lowest], lowest
        encoded = self.encoder.encode_all(chats)
        for number, (chat, digest, each) in enumerate(zip(chats, digests, encoded, strict=True)):
            held_out = is_held_out(digest, chunk.share)
            may_be = held_out or (chunk.share > 0 and out.lowest == (digest, number))
            kept = _Kept(number, digest, held_out, may_be, number < compared)
            self._add(out, chat, each, kept)
        return out

    def _add(self, out: Outcome, chat: Chat, encoded: EncodedChat | TemplateError | DataError, kept: _Kept) -> None:
        state, flags, turns, tokens = REFUSED, kept.held_out * HELD_OUT, 0, 0
        record, look = b"", b""
        try:
            fitting, found = self._fit(chat, encoded)
        except (TemplateError, DataError) as error:
            out.refused[kept.number] = Problem(chat.source, chat.line, Fault(FaultKind.TEMPLATE, error.cause))
        else:
            if found is None:
                state = TOO_LONG
            elif 1 not in found.packed_labels:
                cause = "no token of it would be trained on"
                out.refused[kept.number] = Problem(chat.source, chat.line, Fault(FaultKind.NO_LABEL, cause))
            else:
                state, turns, tokens = USED, len(chat.messages) - len(fitting.messages), len(found)
                flags |= found.special_in_content * SPECIAL | found.boundary_merge * MERGED
                out.ids += found.packed_ids
                out.labelled += found.packed_labels
                record = _record(fitting) if kept.record else b""
                look = pickle.dumps(Look.at(fitting), pickle.HIGHEST_PROTOCOL) if kept.look else b""
                out.records.append(record)
                out.looks.append(look)
        hashes = int.from_bytes(kept.digest[:8]), int.from_bytes(kept.digest[8:16])
        out.rows.append((*hashes, chat.line, out.source, turns, state, flags, tokens, len(record), len(look)))

    def _fit(self, chat: Chat, encoded: EncodedChat | TemplateError | DataError) -> tuple[Chat, EncodedChat | None]:
        """The chat, or as many whole turns of its beginning as fit, ending with an answer; None when none do."""
        if not isinstance(encoded, EncodedChat):
            raise encoded
        if len(encoded) <= self.longest:
            return chat, encoded
        answers = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
        for last in reversed(answers[:-1]):
            if chat.messages[last].tool_calls:
                continue  # a call without its result is no end of a chat
            shorter = dataclasses.replace(chat, messages=chat.messages[: last + 1])
            encoded = self.encoder.encode(shorter)
            if len(encoded) <= self.longest:
                return shorter, encoded
        return chat, None


def _record(chat: Chat) -> bytes:
    """The chat as a line of JSON."""
    record: dict[str, Any] = {"messages": chat.message_dicts()}
    if chat.tools:
        record["tools"] = list(chat.tools)
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
