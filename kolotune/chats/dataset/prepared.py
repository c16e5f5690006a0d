"""The result of preparing chats: counts, problems and findings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError
from kolotune.foundation.typed_storage import JsonObject

from ..reading.faults import Problem
from ..reading.problem_report import affected_records, problem_lines, what_helps
from ..reading.turn_fixes import TurnFix
from ..templates.loss_mask import ApartReason
from ..templates.template import ChatTemplate
from ..tokens.served_tokenizer import Replaced, ServedChange
from ..traits import ChatTrait
from .findings import Finding

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_THOUGHTS = {True: "with_thoughts", False: "without_thoughts"}
TRAITS = "traits"
"""Name of the `Prepared.traits` in the record."""
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class SplitCounts:
    """The training or the held-out chats in numbers.

    Attributes:
        chats: How many there are.
        tokens: Their tokens.
        labelled: The tokens that the loss falls on.
    """

    chats: int = 0
    tokens: int = 0
    labelled: int = 0


@dataclass(frozen=True)
class AffectedChats:
    """Count and first locations of the affected chats."""

    count: int = 0
    locations: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextCounts:
    """Documents in numbers.

    Attributes:
        cut: How many are longer than a sequence, and became several pieces.
        pieces: The number of these pieces.
        sequences: The packed sequences that are trained on.
        held_out_sequences: Those that are held out.
    """

    cut: int
    pieces: int
    sequences: int
    held_out_sequences: int


@dataclass
class Prepared:
    """Everything that preparing found out.

    Attributes:
        template: The chat template, with the date frozen.
        tokenizer: The tokenizer that belongs to it.
        jinja: The template's source.
        replaced: What llama.cpp does otherwise than the base's tokenizer, and so does this one.
        train, held_out: The chats that are used.
        lengths: Tokens of the shortest, the median and the longest sequence that is trained on.
        problems: Every problem; the chats that have one are not used.
        shapes: For each file its format and the shapes of its records.
        unread: The number of chats whose record has each key that is filled and not read.
        absent_keys: The keys to be ignored that no record has.
        fixes_turns: Whether the order of turns is fixed.
        fixes: The number of chats with each change to the order of turns.
        excluded: The number of records without an answer that is trained on, as their author and `train_on` decide.
        untrained_turns: The number of answers that are not trained on for the same reasons, in the other chats.
        weights: The number of answers of these chats with each weight between 0 and 1.
        marked_answers: The number of answers that are each marker of an empty cell.
        duplicates: Copies of earlier chats, which are not used.
        in_both: Held-out chats that are not used since they are trained on.
        shortened: Chats that were too long and lost turns.
        dropped_turns: The number of these turns.
        too_long: Chats that are not used since not even the first answer that is trained on fits.
        undecided: Pairs that are not used since both answers are the same.
        as_served: Chats whose tokens are llama.cpp's, and not those of the base's tokenizer.
        pairs: The number of chats that are used and have a rejected answer, too.
        undesirable: The number of chats that are used and whose answer is labelled as bad.
        has_preferences: Whether the training learns from preferences.
        rated_alike: Whether answers are rated, and all of them alike.
        special_in_content: The number of chats with special tokens in their text.
        reduced_tools: The number of chats whose tool definitions said more than Ollama hands on.
        lost_tool_keys: The keys of these definitions that it does not hand on.
        apart: The number of chats with a sequence for each answer, by the reason.
        masked_thoughts: The number of empty thoughts that are not trained on.
        dropped_thoughts: The number of thoughts that the template leaves out of later prompts.
        renamed_calls: The number of chats whose calls got other ids, since the template refuses theirs.
        split, exchanges: The number of chats of which each exchange became a chat, and the number of these.
        findings: What is striking about the chats as a whole.
        not_compared: The number of chats that the findings do not cover, since there are many.
        traits: What the chats have that servers may write in another way.
        thinking: The number of answers with a thought (True) and without (False), if the template has a switch.
        text: Of documents; None for chats.
        general: The number of chats that are trained on and that the base model answered; they are not the user's.
    """

    template: ChatTemplate
    tokenizer: PreTrainedTokenizerFast
    jinja: str
    replaced: Replaced | None = None
    train: SplitCounts = field(default_factory=SplitCounts)
    held_out: SplitCounts = field(default_factory=SplitCounts)
    lengths: tuple[int, int, int] = (0, 0, 0)
    problems: list[Problem] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    absent_keys: tuple[str, ...] = ()
    fixes_turns: bool = False
    fixes: Counter[TurnFix] = field(default_factory=Counter)
    excluded: int = 0
    untrained_turns: int = 0
    weights: Counter[float] = field(default_factory=Counter)
    marked_answers: Counter[str] = field(default_factory=Counter)
    duplicates: AffectedChats = field(default_factory=AffectedChats)
    in_both: AffectedChats = field(default_factory=AffectedChats)
    shortened: AffectedChats = field(default_factory=AffectedChats)
    dropped_turns: int = 0
    too_long: AffectedChats = field(default_factory=AffectedChats)
    undecided: AffectedChats = field(default_factory=AffectedChats)
    as_served: AffectedChats = field(default_factory=AffectedChats)
    pairs: int = 0
    undesirable: int = 0
    has_preferences: bool = False
    rated_alike: bool = False
    special_in_content: int = 0
    reduced_tools: int = 0
    lost_tool_keys: set[str] = field(default_factory=set)
    apart: dict[ApartReason, int] = field(default_factory=dict)
    masked_thoughts: int = 0
    dropped_thoughts: int = 0
    renamed_calls: int = 0
    split: int = 0
    exchanges: int = 0
    findings: list[Finding] = field(default_factory=list)
    not_compared: int = 0
    traits: set[ChatTrait] = field(default_factory=set)
    thinking: Counter[bool] = field(default_factory=Counter)
    text: TextCounts | None = None
    general: int = 0

    @property
    def noun(self) -> str:
        """What a record is: "chat" or "document"."""
        return "chat" if self.text is None else "document"

    def summary(self) -> JsonObject:
        """Return the counts, as they are kept in the record."""
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
            "unread_keys": dict(self.unread.most_common()),
            "excluded": self.excluded,
            "untrained_turns": self.untrained_turns,
            "weighted_turns": self.weights.total(),
            "lowest_weight": min(self.weights, default=1.0),
            "highest_weight": max(self.weights, default=1.0),
            "marked_answers": self.marked_answers.total(),
            "turn_fixes": {fix.name.lower(): count for fix, count in self.fixes.items()},
            "duplicates": self.duplicates.count,
            "in_both_parts": self.in_both.count,
            "shortened": self.shortened.count,
            "turns_left_out": self.dropped_turns,
            "too_long": self.too_long.count,
            "undecided": self.undecided.count,
            "pairs": self.pairs,
            "undesirable": self.undesirable,
            "as_written": self._replaced(ServedChange.AS_WRITTEN),
            "more_spaces": self._replaced(ServedChange.MORE_SPACES),
            "scored_merges": self._replaced(ServedChange.SCORED_MERGES),
            "special_tokens_in_content": self.special_in_content,
            "reduced_tools": self.reduced_tools,
            "lost_tool_keys": sorted(self.lost_tool_keys),
            **{f"apart_{reason.name.lower()}": self.apart.get(reason, 0) for reason in ApartReason},
            "masked_thoughts": self.masked_thoughts,
            "dropped_thoughts": self.dropped_thoughts,
            "renamed_calls": self.renamed_calls,
            "general_chats": self.general,
            "split_chats": self.split,
            "split_exchanges": self.exchanges,
            "findings": {finding.kind.value: finding.count for finding in self.findings},
            "not_compared": self.not_compared,
            TRAITS: sorted(self.traits),
            **{f"answers_{name}": self.thinking[has] for has, name in _THOUGHTS.items() if self.template.switches},
            **self._text_summary(),
        }

    def _replaced(self, change: ServedChange) -> int:
        return self.as_served.count if self.replaced is not None and self.replaced.change is change else 0

    def _text_summary(self) -> JsonObject:
        if self.text is None:
            return {}
        return {
            "cut_documents": self.text.cut,
            "pieces": self.text.pieces,
            "packed_sequences": self.text.sequences,
            "held_out_packed_sequences": self.text.held_out_sequences,
        }


def require_good(prepared: Prepared, skip_bad: bool) -> None:
    """Check that no chat is bad, or that bad chats may be skipped, and that there is something to train on.

    Raises:
        DataError: With the first problems, each with file and line, and their number.
    """
    if prepared.problems and not skip_bad:
        count = len(prepared.problems)
        lines = problem_lines(prepared.problems)
        shown = lines[:_SHOWN_PROBLEMS]
        if len(lines) > _SHOWN_PROBLEMS:
            shown.append(f"… and {len(lines) - _SHOWN_PROBLEMS} more kinds")
        raise DataError(
            f"{count:,} problem{'s' if count > 1 else ''} in the {prepared.noun}s:\n" + "\n".join(shown),
            hint_against(prepared),
        )
    if not prepared.train.chats:
        raise nothing_to_train_on(prepared)


def hint_against(prepared: Prepared) -> str:
    """Return what helps against the problems of the chats."""
    helps = what_helps(prepared.problems, prepared.fixes_turns)
    if prepared.train.chats:
        bad = affected_records(prepared.problems)
        which = f"that {prepared.noun}" if bad == 1 else f"those {bad:,} {prepared.noun}s"
        skip = f"Fix them, or skip {which} with --skip-bad."
        return f"{helps} {skip}".strip()
    if prepared.text is not None:
        return helps or "Fix the documents."
    return f"{helps} `kolotune init FOLDER` writes a few valid chats to compare with.".strip()


def nothing_to_train_on(prepared: Prepared) -> DataError:
    """Return the error of chats of which none can be trained on, with the reason that affects most of them."""
    bad = affected_records(prepared.problems)
    reasons = [
        (prepared.too_long.count, "are too long", "Raise --max-seq-length."),
        (
            prepared.excluded,
            "are excluded by their own weights or flags, or by --train-on",
            "Change these, or give --ignore-keys.",
        ),
        (prepared.undecided.count, "have the same answer twice", "A pair is a better and a worse answer."),
        (
            0 if prepared.train.chats else prepared.held_out.chats,
            "are held out",
            f"Add {prepared.noun}s, or hold out fewer with --eval-split.",
        ),
        (bad, "are bad", what_helps(prepared.problems, prepared.fixes_turns) or f"Fix the {prepared.noun}s."),
    ]
    count, reason, hint = max(reasons, key=lambda each: each[0])
    return DataError(
        f"no {prepared.noun} is left to train on: {f'{count} {reason}' if count else 'none could be used'}", hint
    )
