"""From files of chats to tokens with labels: read, checked, split, rendered, shortened, counted.

The chats go through in chunks (`chunks`), in several processes when there are many; what becomes of them goes to the
disk (`spool`). The memory is that of the tokenizer and of a few chunks, however many chats there are, and the files
are the same bytes with any number of processes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.config import Config
from kolotune.foundation.errors import DataError
from kolotune.run_folder.layout import HELD_OUT_CHATS, HELD_OUT_TOKENS, TRAIN_TOKENS
from kolotune.runners import workers

from ..reading.faults import Problem
from ..reading.files import describe_shapes, no_chats, opened, require_file
from ..templates.frozen_date import freeze_date
from ..templates.template import ChatTemplate
from ..tokens.encoder import Encoder
from ..tokens.tokenizer import chat_template, load_tokenizer, template_text
from .chunks import HELD_OUT, MERGED, SPECIAL, TOO_LONG, USED, Chunk, Outcome, Work, chunks
from .holdout import settled
from .near_duplicates import COMPARED, Finding, Likeness
from .row_store import Spool

if TYPE_CHECKING:
    import numpy as np

_SHOWN = 20
_LOADED = (Work.__module__, "numpy", "tokenizers")  # by workers, before they are given work
_WORTH_WORKERS = 4 << 20
"""Bytes of data from which on processes bring more than their start costs."""


@dataclass(frozen=True)
class Part:
    """The training or the held-out chats: how many, their tokens, and how many of those are labelled."""

    chats: int = 0
    tokens: int = 0
    labelled: int = 0


@dataclass(frozen=True)
class Places:
    """Chats that something befell: how many, and where the first ones stand."""

    count: int = 0
    shown: tuple[str, ...] = ()


@dataclass
class Prepared:
    """Everything that preparing found out.

    Attributes:
        template: the frozen chat template.
        tokenizer: the tokenizer that belongs to it.
        jinja: the template's source.
        train, held_out: the chats that are used.
        lengths: tokens of the shortest, the median and the longest chat that is trained on.
        problems: bad places; their chats are in neither part.
        shapes: file → container and shape.
        duplicates: copies of earlier chats; they are left out.
        in_both: held-out chats left out because they are trained on.
        shortened: chats that were too long; `turns_left_out`: how many turns they lost in all.
        too_long: chats left out because not even the first answer fits.
        special_in_content: chats with special tokens in their text.
        boundary_merges: chats with a token across the start of an answer.
        findings: what there is to say of the chats as a whole.
        not_compared: how many chats these findings leave out, because there are many.
    """

    template: ChatTemplate
    tokenizer: Any
    jinja: str
    train: Part = field(default_factory=Part)
    held_out: Part = field(default_factory=Part)
    lengths: tuple[int, int, int] = (0, 0, 0)
    problems: list[Problem] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    duplicates: Places = field(default_factory=Places)
    in_both: Places = field(default_factory=Places)
    shortened: Places = field(default_factory=Places)
    turns_left_out: int = 0
    too_long: Places = field(default_factory=Places)
    special_in_content: int = 0
    boundary_merges: int = 0
    findings: list[Finding] = field(default_factory=list)
    not_compared: int = 0

    def summary(self) -> dict[str, Any]:
        """The counts, as they are kept in the record."""
        return {
            "chats": self.train.chats,
            "held_out_chats": self.held_out.chats,
            "tokens": self.train.tokens,
            "labelled_tokens": self.train.labelled,
            "held_out_tokens": self.held_out.tokens,
            "shortest": self.lengths[0],
            "median": self.lengths[1],
            "longest": self.lengths[2],
            "shapes": self.shapes,
            "bad": [str(problem) for problem in self.problems],
            "duplicates": self.duplicates.count,
            "in_both_parts": self.in_both.count,
            "shortened": self.shortened.count,
            "turns_left_out": self.turns_left_out,
            "too_long": self.too_long.count,
            "special_tokens_in_content": self.special_in_content,
            "boundary_merges": self.boundary_merges,
            "findings": {each.kind: each.count for each in self.findings},
            "not_compared": self.not_compared,
        }


def prepare_chats(
    config: Config, base: Path, folder: Path, compared: int | None = COMPARED, processes: int | None = None
) -> Prepared:
    """Reads, checks, splits and encodes the chats of `config` for the base model in folder `base`.

    Writes to `folder` the tokens of both parts, `TRAIN_TOKENS` and `HELD_OUT_TOKENS` (where there are chats), and
    `HELD_OUT_CHATS`. The first `compared` records of each part are held against each other (see `likeness`); None:
    all. `processes`: of how many the work is done; None: what the machine has, when the data is worth it. Problems
    are collected, not raised: see `require_good`.

    Raises:
        DataError: a file can't be read at all.
        ModelError, TemplateError: the base model has no tokenizer or no usable chat template.
    """
    paths = [*config.train_data, *config.eval_data]
    if not config.train_data:
        raise DataError("no file of chats was given", "Give at least one file.")
    size = sum(require_file(path) for path in paths)
    if processes is None:
        processes = workers.available() if size >= _WORTH_WORKERS else 1
    with Spool(folder / "spool") as spool:
        with workers.pool(processes, *_LOADED) as pool:
            tokenizer = load_tokenizer(base)
            day = date.fromisoformat(config.template_date) if config.template_date else date.today()
            jinja = freeze_date(template_text(base), day)
            prepared = Prepared(chat_template(tokenizer, jinja), tokenizer, jinja)
            work = Work(Encoder(prepared.template, tokenizer), config.max_seq_length)
            gathered = _Gathered(prepared, paths, spool)
            for outcome in pool.map(work, gathered.chunks(config, compared)):
                gathered.add(outcome)
        gathered.finish()
        _settle(gathered, config, folder)
    return prepared


class _Gathered:
    """What all chunks told, but for what is in the spool."""

    def __init__(self, prepared: Prepared, paths: Sequence[Path], spool: Spool) -> None:
        self.prepared, self.paths, self.spool = prepared, paths, spool
        self.lowest: tuple[bytes, int] = b"\xff" * 33, -1
        self.refused: list[tuple[int, Problem]] = []
        self._containers = [""] * len(paths)
        self._shapes: list[Counter[str]] = [Counter() for _ in paths]
        self._problems: list[list[Problem]] = [[] for _ in paths]
        self._chats = 0

    def chunks(self, config: Config, compared: int | None) -> Iterator[Chunk]:
        """All files' records."""
        most = sys.maxsize if compared is None else compared
        left = {False: most, True: most}  # of the training data, and of held-out data of its own
        for source, path in enumerate(self.paths):
            from_eval = source >= len(config.train_data)
            share = float(from_eval) if config.eval_data else config.eval_split
            with opened(path) as (self._containers[source], records):
                empty = True
                for chunk in chunks(source, path, share, records, left[from_eval]):
                    empty = False
                    left[from_eval] = max(0, left[from_eval] - len(chunk.records))
                    yield chunk
            if empty:
                raise no_chats(path)

    def add(self, outcome: Outcome) -> None:
        """Takes the outcome of the next chunk."""
        self._shapes[outcome.source] += outcome.shapes
        self._problems[outcome.source] += outcome.problems
        self.refused += [(self._chats + number, problem) for number, problem in outcome.refused.items()]
        if outcome.lowest and outcome.lowest[0] < self.lowest[0]:
            self.lowest = outcome.lowest[0], self._chats + outcome.lowest[1]
        self._chats += len(outcome.rows)
        self.spool.add(outcome)

    def finish(self) -> None:
        """Tells what the files are, and what in them is no chat."""
        self.spool.close()
        for path, container, shapes, problems in zip(
            self.paths, self._containers, self._shapes, self._problems, strict=True
        ):
            self.prepared.shapes[str(path)] = f"{container}, {describe_shapes(shapes)}"
            self.prepared.problems += sorted(problems, key=lambda problem: problem.line)


def _settle(gathered: _Gathered, config: Config, folder: Path) -> None:
    """Decides, now that all chats are known, which are copies, trained on or held out, and writes the files."""
    import numpy as np

    prepared, spool = gathered.prepared, gathered.spool
    rows = spool.rows()
    from_eval = rows["source"] >= len(config.train_data)
    first, in_both = _copies(rows, from_eval)
    copied = first != np.arange(len(rows))
    held_out = from_eval
    if not config.eval_data and len(rows):
        held_out = (rows["flags"] & HELD_OUT) > 0
        position = int(np.count_nonzero(~copied[: gathered.lowest[1]]))
        held_out[~copied] = settled(held_out[~copied], position, config.eval_split)
    kept = ~copied & ~in_both
    used = kept & (rows["state"] == USED)

    def where(index: int) -> str:
        return f"{gathered.paths[rows['source'][index]]}:{rows['line'][index]}"

    def ordered(chosen: np.ndarray) -> list[int]:
        return [int(index) for part in (chosen & ~held_out, chosen & held_out) for index in np.flatnonzero(part)]

    shortened = used & (rows["turns"] > 0)
    prepared.duplicates = _places(
        np.flatnonzero(copied).tolist(), lambda index: f"{where(index)} is {where(int(first[index]))} again"
    )
    prepared.in_both = _places(np.flatnonzero(in_both).tolist(), where)
    prepared.shortened = _places(ordered(shortened), lambda index: f"{where(index)}: {rows['turns'][index]} turns")
    prepared.turns_left_out = int(rows["turns"][shortened].sum())
    prepared.too_long = _places(ordered(kept & (rows["state"] == TOO_LONG)), where)
    refused = [(bool(held_out[index]), index, problem) for index, problem in gathered.refused if kept[index]]
    prepared.problems += [problem for _, _, problem in sorted(refused, key=lambda each: each[:2])]
    prepared.special_in_content = int(np.count_nonzero(used & (rows["flags"] & SPECIAL > 0)))
    prepared.boundary_merges = int(np.count_nonzero(used & (rows["flags"] & MERGED > 0)))
    _write(prepared, spool, rows, used, held_out, folder)


def _copies(rows: np.ndarray, from_eval: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each chat the first one like it in its part; and whether it is held out and trained on."""
    import numpy as np

    order = np.lexsort((rows["hash_too"], rows["hash"]))  # stable: the training data comes first
    same = np.ones(len(rows), bool)
    for column in ("hash", "hash_too"):
        values = rows[column][order]
        same[1:] &= values[1:] == values[:-1]
    same[:1] = False
    known, part = _firsts(order, ~same), from_eval[order]
    same[1:] &= part[1:] == part[:-1]
    first = _firsts(order, ~same)
    return first, from_eval & ~from_eval[known] & (first == np.arange(len(rows)))


def _firsts(order: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """The first member of each chat's group: groups stand together in `order`, and begin where `begins` says."""
    import numpy as np

    first = np.empty_like(order)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    return first


def _places(indices: Sequence[int], told: Any) -> Places:
    return Places(len(indices), tuple(told(index) for index in indices[:_SHOWN]))


def _write(
    prepared: Prepared, spool: Spool, rows: np.ndarray, used: np.ndarray, held_out: np.ndarray, folder: Path
) -> None:
    import numpy as np

    likeness = Likeness()
    parts = []
    for name, chosen in ((TRAIN_TOKENS, used & ~held_out), (HELD_OUT_TOKENS, used & held_out)):
        count, labelled = int(np.count_nonzero(chosen)), 0
        if count:
            labelled = spool.write_tokens(rows, chosen, folder / name)
        parts.append(Part(count, int(rows["tokens"][chosen].sum(dtype=np.int64)), labelled))
        for look in spool.looks(rows, chosen):
            likeness.add(look, name != TRAIN_TOKENS)
    prepared.train, prepared.held_out = parts
    spool.write_records(rows, used & held_out, folder / HELD_OUT_CHATS)
    lengths = rows["tokens"][used & ~held_out]
    if len(lengths):
        prepared.lengths = int(lengths.min()), int(np.median(lengths)), int(lengths.max())
    prepared.findings = likeness.findings()
    prepared.not_compared = int(np.count_nonzero(used & (rows["look"] == 0)))


def require_good(prepared: Prepared, skip_bad: bool) -> None:
    """Raises when chats are bad and may not be skipped, or when nothing is left to train on.

    Raises:
        DataError: with the first problems, each with file and line, and the count of all.
    """
    if prepared.problems and not skip_bad:
        shown = [str(problem) for problem in prepared.problems[:_SHOWN]]
        if len(prepared.problems) > _SHOWN:
            shown.append(f"… and {len(prepared.problems) - _SHOWN} more")
        count = len(prepared.problems)
        raise DataError(
            f"{count} problem{'s' if count > 1 else ''} in the chats:\n" + "\n".join(shown),
            "Mend them, or leave those chats out with --skip-bad.",
        )
    if not prepared.train.chats:
        reason = f"{prepared.too_long.count} are too long" if prepared.too_long.count else "none could be used"
        raise DataError(f"no chat is left to train on: {reason}", "Raise --max-seq-length, or mend the chats.")
