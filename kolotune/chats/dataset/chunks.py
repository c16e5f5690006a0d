"""Chunks of records: each is read, checked and encoded by itself, in a worker process if there are many."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from kolotune.foundation.errors import DataError, TemplateError
from kolotune.foundation.objectives import LearnsFrom
from kolotune.foundation.typed_storage import JsonObject

from ..chat import Chat, trained_answers
from ..reading.faults import Fault, FaultKind, Problem
from ..reading.files import read_chat
from ..reading.markers import marked_answers
from ..reading.reading_options import DEFAULT, ReadingOptions
from ..reading.records import AnyRecord, RawRecord
from ..reading.turn_fixes import TurnFix
from ..templates.rendering import has_thought
from ..tokens.encoded_chat import EncodedChat, packed
from ..tokens.encoder import Encoder
from ..tokens.served_tokenizer import Replaced
from ..tokens.strategies import Encoding
from ..traits import ChatTrait, texts_of, traits_of
from .exchanges import exchanges_of
from .holdout import is_held_out
from .preference_pairs import encode_preferences, is_undecided
from .rows import APART, AS_SERVED, HELD_OUT, REDUCED, REFUSED, SPECIAL, TOO_LONG, UNDECIDED, USED, WEIGHTED, ChatRow
from .shingles import ChatFeatures

_RECORDS = 512
_BYTES = 256 << 10


@dataclass(frozen=True)
class Chunk:
    """Some records of a file.

    Attributes:
        source: The number of the file.
        path: Its path.
        share: The share of its chats to hold out.
        records: The records.
        compared: How many of the first records are searched for near-duplicates.
    """

    source: int
    path: Path
    share: float
    records: list[AnyRecord]
    compared: int


@dataclass
class ChunkResult:
    """What became of a chunk.

    Attributes:
        source: The number of its file.
        shapes: The number of records of each shape.
        unread: The number of records with each key that is filled and not read.
        named: The keys that the user names and a record has; None if no record could be parsed.
        fixes: The number of chats with each change to the order of turns.
        excluded: The number of records that their author excludes from training.
        untrained_turns: The number of answers that their author excludes, in the other chats.
        weights: The number of answers of the other chats with each weight between 0 and 1.
        lost_tool_keys: The keys of tool definitions that Ollama does not hand on.
        marked_answers: The number of answers that are each marker of an empty cell.
        problems: Problems of records that are not chats.
        rows: One for each chat.
        ids: The tokens of all used chats, as int32 in memory.
        labelled: A byte for each of them.
        label_weights: The weights of the tokens of the chats with the flag `WEIGHTED`, as fp32 in memory.
        lengths: The tokens of each sequence of the chats that have several, as int32 in memory.
        records: The chats that may be held out, as lines of JSON.
        features: Pickled `ChatFeatures` of the chats that are searched for near-duplicates.
        renamed_calls: The number of chats whose calls got other ids, since the template refuses theirs.
        split, exchanges: The number of chats of which each exchange became a chat, and the number of these.
        refused: Problems of chats, by the number of the chat's row in the chunk.
        lowest: The lowest hash, and which rows in the chunk are its chat's; None without chats.
        traits: Those of all used chats.
        thinking: The answers of all used chats, by whether they have a thought; only if the template has a switch.
    """

    source: int
    shapes: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)
    named: frozenset[str] | None = None
    fixes: Counter[TurnFix] = field(default_factory=Counter)
    excluded: int = 0
    untrained_turns: int = 0
    weights: Counter[float] = field(default_factory=Counter)
    lost_tool_keys: set[str] = field(default_factory=set)
    marked_answers: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    rows: list[ChatRow] = field(default_factory=list)
    ids: bytearray = field(default_factory=bytearray)
    labelled: bytearray = field(default_factory=bytearray)
    label_weights: bytearray = field(default_factory=bytearray)
    lengths: bytearray = field(default_factory=bytearray)
    records: list[bytes] = field(default_factory=list)
    features: list[bytes] = field(default_factory=list)
    renamed_calls: int = 0
    split: int = 0
    exchanges: int = 0
    refused: dict[int, Problem] = field(default_factory=dict)
    lowest: tuple[bytes, range] | None = None
    traits: set[ChatTrait] = field(default_factory=set)
    thinking: Counter[bool] = field(default_factory=Counter)


def chunks(source: int, path: Path, share: float, records: Iterable[AnyRecord], compared: int) -> Iterator[Chunk]:
    """Yield the records of a file in chunks of bounded size; the first `compared` are searched for near-duplicates."""
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


class _ChatEntry(NamedTuple):
    """A chat of a chunk: the number of its row, its hash, what the hash decides, and what the row store needs of it."""

    chat: Chat
    number: int
    digest: bytes
    unread: int
    held_out: bool
    needs_record: bool
    needs_features: bool


@dataclass(frozen=True)
class ChunkEncoder:
    """Reads and encodes chunks.

    Attributes:
        encoder: Makes the tokens.
        longest: The most tokens of a sequence.
        reading: What the user decides about the reading of chats.
        replaced: What llama.cpp does otherwise than the base's tokenizer.
    """

    encoder: Encoder
    longest: int
    reading: ReadingOptions = DEFAULT
    replaced: Replaced | None = None

    def __call__(self, chunk: Chunk) -> ChunkResult:
        result = ChunkResult(chunk.source)
        chats: list[Chat] = []
        unread: list[int] = []
        compared = 0
        for number, record in enumerate(chunk.records):
            read = read_chat(chunk.path, record, self.reading)
            result.shapes[read.shape] += bool(read.shape)
            result.problems += read.problems
            if read.named is not None and read.named != result.named:
                result.named = read.named | (result.named or frozenset())
            if read.chat is not None:
                chats.append(read.chat)
                unread.append(read.unread_hash)
                compared += number < chunk.compared
                result.marked_answers.update(marked_answers(read.chat.messages))
                if not read.chat.is_plain and self.reading.learns_from is LearnsFrom.CHATS:
                    lighter = [turn.weight for turn in read.chat.messages if turn.weight < 1]
                    result.untrained_turns += lighter.count(0)
                    result.weights.update(filter(None, lighter))
                for key in read.unread:
                    result.unread[key] += 1
                for fix in read.fixes:
                    result.fixes[fix] += 1
            elif not read.problems:
                result.excluded += 1
        digests = [chat.content_hash() for chat in chats]
        accepted = [self.encoder.accepted(chat) for chat in chats]
        result.renamed_calls += sum([new is not old for new, old in zip(accepted, chats, strict=True)])
        chats = accepted
        lowest = min(digests, default=b"")
        encodings = encode_preferences(self.encoder, chats)
        for number, (chat, digest, encoding) in enumerate(zip(chats, digests, encodings, strict=True)):
            held_out = is_held_out(digest, chunk.share)
            first = len(result.rows)
            may_be_held_out = held_out or (chunk.share > 0 and digest == lowest)
            for part, (exchange, encoded) in enumerate(self._exchanges(result, chat, encoding)):
                own = hashlib.sha256(digest + bytes([part % 256, part // 256])).digest() if part else digest
                at = len(result.rows)
                entry = _ChatEntry(exchange, at, own, unread[number], held_out, may_be_held_out, number < compared)
                self._add(result, entry, encoded)
            if digest == lowest and result.lowest is None:
                result.lowest = digest, range(first, len(result.rows))
        return result

    def _exchanges(self, result: ChunkResult, chat: Chat, encoding: Encoding) -> list[tuple[Chat, Encoding]]:
        """Return a chat, or one chat of each of its exchanges if earlier thoughts would be left out otherwise."""
        splits = self.reading.splits_thoughts and isinstance(encoding, EncodedChat) and encoding.dropped_thoughts
        splits = splits and self.reading.learns_from is LearnsFrom.CHATS
        exchanges = exchanges_of(chat) if splits else []
        if not exchanges:
            return [(chat, encoding)]
        result.split += 1
        result.exchanges += len(exchanges)
        encodings = self.encoder.encode_all(exchanges)
        undropped = [
            dataclasses.replace(each, dropped_thoughts=0) if isinstance(each, EncodedChat) else each
            for each in encodings
        ]
        return list(zip(exchanges, undropped, strict=True))

    def _add(self, result: ChunkResult, entry: _ChatEntry, encoding: Encoding) -> None:
        chat = entry.chat
        state, flags, turns, tokens = REFUSED, entry.held_out * HELD_OUT, 0, 0
        sequences, masked, dropped, rejected = 1, 0, 0, 0
        record, features = b"", b""
        try:
            fitting, encoded = self._fit(chat, encoding)
        except (TemplateError, DataError) as error:
            fault = Fault(FaultKind.TEMPLATE, error.cause)
            result.refused[entry.number] = Problem(chat.source, chat.line, fault)
        else:
            if is_undecided(chat, encoding):
                state = UNDECIDED
            elif encoded is None:
                state = TOO_LONG
            elif 1 not in encoded.packed_labels:
                fault = Fault(FaultKind.NO_LABEL, "none of its tokens would be trained on")
                result.refused[entry.number] = Problem(chat.source, chat.line, fault)
            else:
                state, turns, tokens = USED, len(chat.messages) - len(fitting.messages), len(encoded)
                flags |= encoded.special_in_content * SPECIAL | bool(chat.lost_tool_keys) * REDUCED
                result.lost_tool_keys.update(chat.lost_tool_keys)
                masked, dropped = encoded.masked_thoughts, encoded.dropped_thoughts
                result.ids += encoded.packed_ids
                result.labelled += encoded.packed_labels
                result.label_weights += encoded.packed_weights
                flags |= bool(encoded.packed_weights) * WEIGHTED
                if self.replaced is not None:
                    flags |= self.replaced.affects(texts_of(fitting)) * AS_SERVED
                rejected = encoded.rejected
                if encoded.apart is not None:
                    flags |= APART[encoded.apart]
                if encoded.ends:
                    sequences = len(encoded.ends)
                    result.lengths += packed(encoded.lengths)
                record = _json_line(fitting) if entry.needs_record else b""
                if entry.needs_features:
                    features = pickle.dumps(ChatFeatures.of(fitting), pickle.HIGHEST_PROTOCOL)
                result.traits |= traits_of(fitting)
                if fitting.rejected:
                    result.traits |= traits_of(fitting.rejected_chat)
                if self.encoder.template.switches:
                    answers = [message for message in fitting.messages if message.role == "assistant"]
                    result.thinking.update(map(has_thought, answers))
                result.records.append(record)
                result.features.append(features)
        digest = entry.digest
        hashes = int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])
        counts = turns, state, flags, tokens, sequences, masked, dropped, rejected
        result.rows.append(
            ChatRow(*hashes, entry.unread, chat.line, result.source, *counts, len(record), len(features))
        )

    def _fit(self, chat: Chat, encoding: Encoding) -> tuple[Chat, EncodedChat | None]:
        """Return the chat, or as many of its first turns as fit, ending with an answer; None if not even one fits."""
        if not isinstance(encoding, EncodedChat):
            raise encoding
        if len(encoding) <= self.longest or max(encoding.lengths) <= self.longest:
            return chat, encoding
        if chat.rejected:
            return chat, None
        answers = trained_answers(chat)
        if encoding.ends:  # what fits does not change with what follows
            too_long = next(at for at, length in enumerate(encoding.lengths) if length > self.longest)
            answers = answers[: too_long + 1]
        for last in reversed(answers[:-1]):
            if chat.messages[last].tool_calls:
                continue  # a chat can't end with a call without its result
            shorter = dataclasses.replace(chat, messages=chat.messages[: last + 1])
            encoding = self.encoder.encode(shorter)
            if max(encoding.lengths) <= self.longest:
                return shorter, encoding
        return chat, None


def _json_line(chat: Chat) -> bytes:
    messages = chat.message_dicts()
    for message, record_of_turn in zip(chat.messages, messages, strict=True):
        if message.weight < 1:
            record_of_turn["weight"] = message.weight or 0
    record: JsonObject = {"messages": messages}
    if chat.tools:
        record["tools"] = list(chat.tools)
    if chat.rejected:
        record["rejected"] = [message.as_dict() for message in chat.rejected]
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
