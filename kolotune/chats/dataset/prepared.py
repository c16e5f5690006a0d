"""The result of preparing chats: counts, problems and findings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError
from kolotune.foundation.typed_storage import JsonObject

from ..reading.faults import Problem
from ..templates.loss_mask import ApartReason
from ..templates.template import ChatTemplate
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


@dataclass
class Prepared:
    """Everything that preparing found out.

    Attributes:
        template: The chat template, with the date frozen.
        tokenizer: The tokenizer that belongs to it.
        jinja: The template's source.
        train, held_out: The chats that are used.
        lengths: Tokens of the shortest, the median and the longest sequence that is trained on.
        problems: Every problem; the chats that have one are not used.
        shapes: For each file its format and the shapes of its records.
        duplicates: Copies of earlier chats, which are not used.
        in_both: Held-out chats that are not used since they are trained on.
        shortened: Chats that were too long and lost turns.
        dropped_turns: The number of these turns.
        too_long: Chats that are not used since not even the first answer fits.
        special_in_content: The number of chats with special tokens in their text.
        reduced_tools: The number of chats whose tool definitions said more than Ollama hands on.
        apart: The number of chats with a sequence for each answer, by the reason.
        masked_thoughts: The number of empty thoughts that are not trained on.
        dropped_thoughts: The number of thoughts that the template leaves out of later prompts.
        findings: What is striking about the chats as a whole.
        not_compared: The number of chats that the findings do not cover, since there are many.
        traits: What the chats have that servers may write in another way.
        thinking: The number of answers with a thought (True) and without (False), if the template has a switch.
    """

    template: ChatTemplate
    tokenizer: PreTrainedTokenizerFast
    jinja: str
    train: SplitCounts = field(default_factory=SplitCounts)
    held_out: SplitCounts = field(default_factory=SplitCounts)
    lengths: tuple[int, int, int] = (0, 0, 0)
    problems: list[Problem] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    duplicates: AffectedChats = field(default_factory=AffectedChats)
    in_both: AffectedChats = field(default_factory=AffectedChats)
    shortened: AffectedChats = field(default_factory=AffectedChats)
    dropped_turns: int = 0
    too_long: AffectedChats = field(default_factory=AffectedChats)
    special_in_content: int = 0
    reduced_tools: int = 0
    apart: dict[ApartReason, int] = field(default_factory=dict)
    masked_thoughts: int = 0
    dropped_thoughts: int = 0
    findings: list[Finding] = field(default_factory=list)
    not_compared: int = 0
    traits: set[ChatTrait] = field(default_factory=set)
    thinking: Counter[bool] = field(default_factory=Counter)

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
            "duplicates": self.duplicates.count,
            "in_both_parts": self.in_both.count,
            "shortened": self.shortened.count,
            "turns_left_out": self.dropped_turns,
            "too_long": self.too_long.count,
            "special_tokens_in_content": self.special_in_content,
            "reduced_tools": self.reduced_tools,
            **{f"apart_{reason.name.lower()}": self.apart.get(reason, 0) for reason in ApartReason},
            "masked_thoughts": self.masked_thoughts,
            "dropped_thoughts": self.dropped_thoughts,
            "findings": {finding.kind.value: finding.count for finding in self.findings},
            "not_compared": self.not_compared,
            TRAITS: sorted(self.traits),
            **{f"answers_{name}": self.thinking[has] for has, name in _THOUGHTS.items() if self.template.switches},
        }


def require_good(prepared: Prepared, skip_bad: bool) -> None:
    """Check that no chat is bad, or that bad chats may be skipped, and that there is something to train on.

    Raises:
        DataError: With the first problems, each with file and line, and their number.
    """
    count = len(prepared.problems)
    if count and not skip_bad:
        shown = [str(problem) for problem in prepared.problems[:_SHOWN_PROBLEMS]]
        if count > _SHOWN_PROBLEMS:
            shown.append(f"… and {count - _SHOWN_PROBLEMS} more")
        raise DataError(
            f"{count} problem{'s' if count > 1 else ''} in the chats:\n" + "\n".join(shown),
            "Fix them, or skip those chats with --skip-bad.",
        )
    if not prepared.train.chats:
        reason = f"{prepared.too_long.count} are too long" if prepared.too_long.count else "none could be used"
        raise DataError(f"no chat is left to train on: {reason}", "Raise --max-seq-length, or fix the chats.")
