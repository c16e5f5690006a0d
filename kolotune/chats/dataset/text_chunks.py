"""Chunks of documents: each is read, checked and encoded by itself, in a worker process if there are many."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import dataclass

from kolotune.foundation.errors import DataError

from ..chat import Chat, Message
from ..reading.documents import Document, read_document
from ..reading.faults import Fault, FaultKind, Problem
from ..reading.reading_options import ReadingOptions
from ..tokens.encoded_chat import packed
from ..tokens.served_tokenizer import Replaced
from ..tokens.text_encoder import TextEncoder, packed_piece_labels, packed_pieces, pieces_of
from ..traits import traits_of
from .chunks import Chunk, ChunkResult
from .holdout import is_held_out
from .rows import AS_SERVED, HELD_OUT, REFUSED, USED, ChatRow
from .shingles import ChatFeatures

_ANSWER = Message("assistant", "")


@dataclass(frozen=True)
class TextChunkEncoder:
    """Reads and encodes chunks of documents.

    Attributes:
        encoder: Makes the tokens.
        longest: The most tokens of a piece.
        reading: What the user decides about the reading of documents.
        replaced: What llama.cpp does otherwise than the base's tokenizer.
    """

    encoder: TextEncoder
    longest: int
    reading: ReadingOptions
    replaced: Replaced | None = None

    def __call__(self, chunk: Chunk) -> ChunkResult:
        """Return what became of the documents; each is a row, and its pieces are the row's sequences."""
        result = ChunkResult(chunk.source)
        documents = []
        for record in chunk.records:
            read = read_document(chunk.path, record, self.reading)
            if read.problem is not None:
                result.problems.append(read.problem)
                continue
            documents.append(read)
            result.shapes[read.key] += 1
            result.unread.update(read.unread)
        digests = [hashlib.sha256((read.text or "").encode("utf-8", "surrogatepass")).digest() for read in documents]
        encoded = self.encoder.encode_all([read.text or "" for read in documents])
        lowest = min(digests, default=b"")
        for number, (read, digest, ids) in enumerate(zip(documents, digests, encoded, strict=True)):
            if digest == lowest and result.lowest is None:
                result.lowest = digest, range(len(result.rows), len(result.rows) + 1)
            is_compared = number < chunk.compared
            self._add(result, chunk, read, digest, ids, is_lowest=digest == lowest, is_compared=is_compared)
        return result

    def _add(
        self,
        result: ChunkResult,
        chunk: Chunk,
        read: Document,
        digest: bytes,
        ids: list[int] | DataError,
        *,
        is_lowest: bool,
        is_compared: bool,
    ) -> None:
        held_out = is_held_out(digest, chunk.share)
        flags = held_out * HELD_OUT
        state, tokens, sequences, record, features = REFUSED, 0, 1, b"", b""
        if isinstance(ids, DataError):
            fault = Fault(FaultKind.TEMPLATE, ids.cause)
            result.refused[len(result.rows)] = Problem(chunk.path, read.line, fault)
        else:
            pieces = pieces_of(ids, self.longest)
            state, tokens, sequences = USED, sum(map(len, pieces)), len(pieces)
            result.ids += packed_pieces(pieces)
            result.labelled += b"".join(map(packed_piece_labels, pieces))
            if sequences > 1:
                result.lengths += packed(list(map(len, pieces)))
            if held_out or (chunk.share > 0 and is_lowest):
                record = (json.dumps({"text": read.text}, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
            result.records.append(record)
            if self.replaced is not None:
                flags |= self.replaced.affects([read.text or ""]) * AS_SERVED
            as_chat = Chat((Message("user", read.text or ""), _ANSWER), chunk.path, read.line)
            if is_compared:
                features = pickle.dumps(ChatFeatures.of(as_chat), pickle.HIGHEST_PROTOCOL)
            result.features.append(features)
            result.traits |= traits_of(as_chat)
        hashes = int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])
        counts = 0, state, flags, tokens, sequences, 0, 0, 0
        result.rows.append(ChatRow(*hashes, 0, read.line, result.source, *counts, len(record), len(features)))
