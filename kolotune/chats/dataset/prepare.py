"""Prepare a data set: read, check, split, render, encode, shorten and count chats.

1. Files → chunks of records (`chunks`).
2. Chunk → rows, token ids and labels (`ChunkEncoder`), in several processes if there are many chats.
3. These → the row store on disk (`row_store`).
4. All rows → which chats are copies, dropped, trained on or held out → the files that are trained on.

The memory is that of the tokenizer and of a few chunks, however many chats there are, and the files are the same
bytes with any number of processes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kolotune.foundation.config import Config
from kolotune.foundation.errors import DataError
from kolotune.foundation.objectives import OBJECTIVES, LearnsFrom
from kolotune.run_folder.layout import GENERAL_CHATS, HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS
from kolotune.runners import workers

from ..reading.faults import Problem
from ..reading.files import describe_shapes, no_chats, opened, require_file
from ..reading.printable import printable
from ..reading.reading_options import ReadingOptions
from ..reading.record_keys import canonical
from ..tokens.encoder import Encoder
from ..tokens.text_encoder import TextEncoder
from ..tokens.tokenizer import chat_template, load_served_tokenizer, special_tokens
from ..tokens.trained_template import trained_template
from .chunks import Chunk, ChunkEncoder, ChunkResult, chunks
from .copies import find_copies
from .holdout import final_split
from .near_duplicates import COMPARED, SimilarityReport
from .prepared import AffectedChats, Prepared, SplitCounts, TextCounts
from .row_store import RowStore
from .rows import APART, AS_SERVED, HELD_OUT, REDUCED, SPECIAL, TOO_LONG, UNDECIDED, USED
from .text_chunks import TextChunkEncoder

_SHOWN_LOCATIONS = 20
_LOADED = (ChunkEncoder.__module__, "numpy", "tokenizers")  # by workers, before they get work
_WORTH_WORKERS = 4 << 20
"""Bytes of data from which on processes save more than their start costs."""


def prepare_chats(
    config: Config,
    base: Path,
    folder: Path,
    compared: int | None = COMPARED,
    processes: int | None = None,
    write_general: Callable[[Prepared, int], None] | None = None,
) -> Prepared:
    """Read, check, split and encode the chats of a config.

    Problems are collected, not raised: see `require_good`.

    Args:
        config: The resolved config.
        base: The folder of the base model.
        folder: Receives `TRAIN_TOKENS`, `HELD_OUT_TOKENS` (if there are such chats) and `HELD_OUT_CHATS`.
        compared: The number of records of each part, the first ones, that are searched for near-duplicates; None for
            all.
        processes: The number of processes to use; None for as many as the machine has, if the data is worth it.
        write_general: Writes `GENERAL_CHATS` into the folder, given the number of chats to train on. They are trained
            on, too, and never held out.

    Raises:
        DataError: A file can't be read at all, or no record has a key that the user gave a part of a chat.
        ModelError, TemplateError: The base model has no tokenizer or no usable chat template.
    """
    paths = [*config.train_data, *config.eval_data]
    if not config.train_data:
        raise DataError("no file of chats was given", "Give at least one file.")
    size = sum(require_file(path) for path in paths)
    if processes is None:
        processes = workers.available() if size >= _WORTH_WORKERS else 1
    with RowStore(folder / "rows") as store:
        with workers.pool(processes, *_LOADED) as pool:
            tokenizer, replaced = load_served_tokenizer(base)
            jinja = trained_template(config, base, special_tokens(tokenizer))
            prepared = Prepared(chat_template(tokenizer, jinja), tokenizer, jinja, replaced)
            prepared.fixes_turns = config.fix_turns
            encoder = _chunk_encoder(config, prepared, ReadingOptions.of(config))
            collector = _Collector(prepared, paths, len(config.train_data), store)
            for result in pool.map(encoder, collector.chunks(config, compared)):
                collector.add(result)
            prepared.absent_keys = _absent_keys(config, collector.named)
            if write_general is not None and collector.to_train:
                write_general(prepared, collector.to_train)
                encoder = _chunk_encoder(config, prepared, ReadingOptions())
                for result in pool.map(encoder, collector.general_chunks(folder / GENERAL_CHATS)):
                    collector.add(result)
        collector.finish()
        _split(collector, config, folder)
    return prepared


def _chunk_encoder(config: Config, prepared: Prepared, reading: ReadingOptions) -> Callable[[Chunk], ChunkResult]:
    if reading.learns_from is LearnsFrom.TEXT:
        return TextChunkEncoder(TextEncoder(prepared.tokenizer), config.max_seq_length, reading, prepared.replaced)
    encode = Encoder(prepared.template, prepared.tokenizer, config.empty_thoughts == "learn")
    return ChunkEncoder(encode, config.max_seq_length, reading, prepared.replaced)


def _absent_keys(config: Config, named: frozenset[str] | None) -> tuple[str, ...]:
    """Return the keys to be ignored that no record has.

    Raises:
        DataError: No record has a key that the user gave a part of a chat.
    """
    if named is None:
        return ()
    for entry in config.map:
        key = entry.split("=", 1)[1]
        if canonical(key) not in named:
            shown = printable(key, 40)
            raise DataError(f"map: no record has the key {shown}", f"Correct or remove {printable(entry, 60)}.")
    return tuple([key for key in config.ignore_keys if canonical(key) not in named])


class _Collector:
    """Collects the results of all chunks, except what is in the row store."""

    def __init__(self, prepared: Prepared, paths: Sequence[Path], training: int, store: RowStore) -> None:
        self.prepared, self.paths, self.store = prepared, paths, store
        self._training = training  # the first paths; the others have chats to hold out
        self.lowest: tuple[bytes, range] = b"\xff" * 33, range(0)
        self.refused: list[tuple[int, Problem]] = []
        self._formats = [""] * len(paths)
        self._shapes: list[Counter[str]] = [Counter() for _ in paths]
        self._problems: list[list[Problem]] = [[] for _ in paths]
        self._chats = 0
        self._reading = ReadingOptions()
        self.named: frozenset[str] | None = None
        self.to_train = 0  # chats, as far as their own hashes decide

    def chunks(self, config: Config, compared: int | None) -> Iterator[Chunk]:
        """Yield the records of all files."""
        self._reading = ReadingOptions.of(config)
        most = sys.maxsize if compared is None else compared
        to_compare = {False: most, True: most}  # of the training data, and of separate held-out data
        for source, path in enumerate(self.paths):
            from_eval = source >= len(config.train_data)
            share = float(from_eval) if config.eval_data else config.eval_split
            with opened(path, self._reading) as (self._formats[source], records):
                empty = True
                for chunk in chunks(source, path, share, records, to_compare[from_eval]):
                    empty = False
                    to_compare[from_eval] = max(0, to_compare[from_eval] - len(chunk.records))
                    yield chunk
            if empty:
                raise no_chats(path)

    def general_chunks(self, path: Path) -> Iterator[Chunk]:
        """Yield the chats that the base answered."""
        with opened(path, ReadingOptions()) as (_, records):
            yield from chunks(len(self.paths), path, 0, records, 0)

    def add(self, result: ChunkResult) -> None:
        """Add the result of the next chunk."""
        if result.source < len(self.paths):
            self._shapes[result.source] += result.shapes
            self._problems[result.source] += result.problems
        if result.named is not None:
            self.named = result.named | (self.named or frozenset())
        self.prepared.unread += result.unread
        self.prepared.fixes += result.fixes
        self.prepared.excluded += result.excluded
        self.prepared.untrained_turns += result.untrained_turns
        self.prepared.weights += result.weights
        if result.source < len(self.paths):
            self.prepared.marked_answers += result.marked_answers
        self.prepared.renamed_calls += result.renamed_calls
        self.prepared.split += result.split
        self.prepared.exchanges += result.exchanges
        self.refused += [(self._chats + number, problem) for number, problem in result.refused.items()]
        if result.source < self._training:
            self.to_train += sum(row.state == USED and not row.flags & HELD_OUT for row in result.rows)
        if result.lowest and result.source < len(self.paths) and result.lowest[0] < self.lowest[0]:
            rows = result.lowest[1]
            self.lowest = result.lowest[0], range(self._chats + rows.start, self._chats + rows.stop)
        self._chats += len(result.rows)
        self.prepared.traits |= result.traits
        self.prepared.lost_tool_keys |= result.lost_tool_keys
        self.prepared.thinking += result.thinking
        self.store.add(result)

    def finish(self) -> None:
        """Report the formats of the files and the problems of their records."""
        self.store.close()
        for path, file_format, shapes, problems in zip(
            self.paths, self._formats, self._shapes, self._problems, strict=True
        ):
            self.prepared.shapes[str(path)] = f"{file_format}, {describe_shapes(shapes)}"
            self.prepared.problems += sorted(problems, key=lambda problem: problem.line)


def _split(collector: _Collector, config: Config, folder: Path) -> None:
    """Decide, once all chats are known, which are copies, trained on or held out, and write the files."""
    prepared, store = collector.prepared, collector.store
    rows = store.rows()
    is_own = rows["source"] < len(collector.paths)
    from_eval = (rows["source"] >= len(config.train_data)) & is_own
    first, in_both = find_copies(rows, from_eval)
    copied = first != np.arange(len(rows))
    held_out = from_eval
    if not config.eval_data and len(rows):
        held_out = (rows["flags"] & HELD_OUT) > 0
        exchanges = collector.lowest[1]
        lowest = int(np.count_nonzero(~copied[: exchanges.start]))
        chosen = is_own & ~copied
        held_out[chosen] = final_split(held_out[chosen], lowest, config.eval_split)
        if held_out[exchanges.start]:  # with its other exchanges
            held_out[exchanges.start : exchanges.stop] = True
    kept = ~copied & ~in_both
    used = kept & (rows["state"] == USED)

    def where(index: int) -> str:
        path = collector.paths[rows["source"][index]] if is_own[index] else Path(GENERAL_CHATS)
        return f"{path}:{rows['line'][index]}"

    def in_order(chosen: np.ndarray) -> list[int]:
        return [int(index) for part in (chosen & ~held_out, chosen & held_out) for index in np.flatnonzero(part)]

    shortened = used & (rows["turns"] > 0)
    prepared.duplicates = _affected(
        np.flatnonzero(copied).tolist(), lambda index: f"{where(index)} is {where(int(first[index]))} again"
    )
    prepared.in_both = _affected(np.flatnonzero(in_both).tolist(), where)
    prepared.shortened = _affected(in_order(shortened), lambda index: f"{where(index)}: {rows['turns'][index]} turns")
    prepared.dropped_turns = int(rows["turns"][shortened].sum())
    prepared.too_long = _affected(in_order(kept & (rows["state"] == TOO_LONG)), where)
    prepared.undecided = _affected(in_order(kept & (rows["state"] == UNDECIDED)), where)
    prepared.as_served = _affected(in_order(used & (rows["flags"] & AS_SERVED > 0)), where)
    rejected, sequences = rows["rejected"][used], rows["sequences"][used]
    prepared.pairs = int(np.count_nonzero((rejected > 0) & (rejected < sequences)))
    prepared.undesirable = int(np.count_nonzero(rejected == sequences))
    learns_from = OBJECTIVES[config.objective].learns_from
    prepared.has_preferences = OBJECTIVES[config.objective].has_preferences
    prepared.rated_alike = (
        learns_from is LearnsFrom.RATED and not prepared.pairs and prepared.undesirable in (0, len(rejected))
    )
    refused = [(bool(held_out[index]), index, problem) for index, problem in collector.refused if kept[index]]
    prepared.problems += [problem for _, _, problem in sorted(refused, key=lambda entry: entry[:2])]
    prepared.general = int(np.count_nonzero(used & ~is_own))
    _count_peculiarities(prepared, rows, used)
    if learns_from is LearnsFrom.TEXT:
        cut = used & (rows["sequences"] > 1)
        packed = _write_packed(prepared, store, rows, used, held_out, folder, config.max_seq_length)
        prepared.text = TextCounts(
            int(np.count_nonzero(cut)),
            int(rows["sequences"][cut].sum(dtype=np.int64)),
            *packed,
        )
    else:
        _write(prepared, store, rows, used, held_out, folder)
        prepared.not_compared -= prepared.general


def _count_peculiarities(prepared: Prepared, rows: np.ndarray, used: np.ndarray) -> None:
    """Count what is worth knowing of the chats that are used."""
    prepared.special_in_content = int(np.count_nonzero(used & (rows["flags"] & SPECIAL > 0)))
    prepared.reduced_tools = int(np.count_nonzero(used & (rows["flags"] & REDUCED > 0)))
    for reason, flag in APART.items():
        prepared.apart[reason] = int(np.count_nonzero(used & (rows["flags"] & flag > 0)))
    prepared.masked_thoughts = int(rows["masked"][used].sum(dtype=np.int64))
    prepared.dropped_thoughts = int(rows["dropped"][used].sum(dtype=np.int64))


def _affected(indices: Sequence[int], describe: Callable[[int], str]) -> AffectedChats:
    return AffectedChats(len(indices), tuple(map(describe, indices[:_SHOWN_LOCATIONS])))


def _write(
    prepared: Prepared, store: RowStore, rows: np.ndarray, used: np.ndarray, held_out: np.ndarray, folder: Path
) -> None:
    similarity = SimilarityReport()
    parts = []
    for name, chosen in ((TRAIN_TOKENS, used & ~held_out), (HELD_OUT_TOKENS, used & held_out)):
        count, labelled = int(np.count_nonzero(chosen)), 0
        if count:
            labelled = store.write_tokens(rows, chosen, folder / name)
        parts.append(SplitCounts(count, int(rows["tokens"][chosen].sum(dtype=np.int64)), labelled))
        for features in store.features(rows, chosen):
            similarity.add(features, name != TRAIN_TOKENS)
    prepared.train, prepared.held_out = parts
    store.write_records(rows, used & held_out, folder / HELD_OUT_CHATS)
    lengths = store.sequence_lengths(rows, used & ~held_out)
    if len(lengths):
        prepared.lengths = int(lengths.min()), int(np.median(lengths)), int(lengths.max())
    prepared.findings = similarity.findings()
    prepared.not_compared = int(np.count_nonzero(used & (rows["features"] == 0)))


def _write_packed(
    prepared: Prepared,
    store: RowStore,
    rows: np.ndarray,
    used: np.ndarray,
    held_out: np.ndarray,
    folder: Path,
    longest: int,
) -> list[int]:
    """Write documents; return the number of packed sequences that are trained on, and of those held out."""
    similarity = SimilarityReport(of_documents=True)
    parts, packed = [], []
    for name, chosen in ((TRAIN_TOKENS, used & ~held_out), (HELD_OUT_TOKENS, used & held_out)):
        count, tokens = int(np.count_nonzero(chosen)), int(rows["tokens"][chosen].sum(dtype=np.int64))
        packed.append(store.write_packed(rows, chosen, folder / name, longest) if count else 0)
        # The loss falls on all tokens but the first of each piece.
        parts.append(SplitCounts(count, tokens, tokens - int(rows["sequences"][chosen].sum(dtype=np.int64))))
        for features in store.features(rows, chosen):
            similarity.add(features, name != TRAIN_TOKENS)
    prepared.train, prepared.held_out = parts
    store.write_records(rows, used & held_out, folder / HELD_OUT_CHATS)
    lengths = store.sequence_lengths(rows, used & ~held_out)
    if len(lengths):
        prepared.lengths = int(lengths.min()), int(np.median(lengths)), int(lengths.max())
    prepared.findings = similarity.findings()
    prepared.not_compared = int(np.count_nonzero(used & (rows["features"] == 0)))
    return packed
