"""From files of chats to tokens with labels: read, checked, split, rendered, shortened, counted."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import DataError, TemplateError
from . import Chat
from .encoding import EncodedChat, Encoder
from .formats import Problem, ReadResult, read_chats
from .likeness import COMPARED, Finding, Likeness
from .split import content_hash, split
from .template import ChatTemplate, freeze_date
from .tokenizer import chat_template, load_tokenizer, template_text

_SHOWN = 20


@dataclass
class Part:
    """The training or the held-out chats, encoded."""

    chats: list[Chat] = field(default_factory=list)
    encoded: list[EncodedChat] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(each.ids) for each in self.encoded)

    @property
    def labelled(self) -> int:
        return sum(sum(each.labelled) for each in self.encoded)


@dataclass
class Prepared:
    """Everything that preparing found out.

    Attributes:
        train, held_out: the chats that are used.
        problems: bad places; their chats are in neither part.
        shapes: file → container and shape.
        duplicates: (where of the copy, where of the first); copies are left out.
        in_both: held-out chats left out because they are trained on.
        shortened: (where, turns left out) of chats that were too long.
        too_long: where of chats left out because not even the first answer fits.
        findings: what there is to say of the chats as a whole.
        not_compared: how many chats these findings leave out, because there are many.
        template: the frozen chat template.
        tokenizer: the tokenizer that belongs to it.
    """

    template: ChatTemplate
    tokenizer: Any
    jinja: str
    train: Part = field(default_factory=Part)
    held_out: Part = field(default_factory=Part)
    problems: list[Problem] = field(default_factory=list)
    shapes: dict[str, str] = field(default_factory=dict)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    in_both: list[str] = field(default_factory=list)
    shortened: list[tuple[str, int]] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    not_compared: int = 0

    def summary(self) -> dict[str, Any]:
        """The counts, as they are kept in the record."""
        lengths = [len(each.ids) for each in self.train.encoded]
        return {
            "chats": len(self.train.chats),
            "held_out_chats": len(self.held_out.chats),
            "tokens": self.train.tokens,
            "labelled_tokens": self.train.labelled,
            "held_out_tokens": self.held_out.tokens,
            "shortest": min(lengths, default=0),
            "median": int(statistics.median(lengths)) if lengths else 0,
            "longest": max(lengths, default=0),
            "shapes": self.shapes,
            "bad": [str(problem) for problem in self.problems],
            "duplicates": len(self.duplicates),
            "in_both_parts": len(self.in_both),
            "shortened": len(self.shortened),
            "turns_left_out": sum(turns for _, turns in self.shortened),
            "too_long": len(self.too_long),
            "special_tokens_in_content": self._count("special_in_content"),
            "boundary_merges": self._count("boundary_merge"),
            "findings": {each.kind: each.count for each in self.findings},
            "not_compared": self.not_compared,
        }

    def _count(self, name: str) -> int:
        return sum(getattr(each, name) for part in (self.train, self.held_out) for each in part.encoded)


def prepare_chats(config: Config, base: Path, compared: int | None = COMPARED) -> Prepared:
    """Reads, checks, splits and encodes the chats of `config` for the base model in folder `base`.

    Of each part the first `compared` chats are held against each other (see `likeness`); None: all. Problems are
    collected, not raised: see `require_good`.

    Raises:
        DataError: a file can't be read at all.
        ModelError, TemplateError: the base model has no tokenizer or no usable chat template.
    """
    read = read_chats(config.train_data)
    held_out_read = read_chats(config.eval_data) if config.eval_data else None
    tokenizer = load_tokenizer(base)
    day = date.fromisoformat(config.template_date) if config.template_date else date.today()
    jinja = freeze_date(template_text(base), day)
    prepared = Prepared(chat_template(tokenizer, jinja), tokenizer, jinja)
    train, held_out = _parts(prepared, read, held_out_read, config.eval_split)
    likeness = Likeness(compared)
    for part, chats in ((prepared.train, train), (prepared.held_out, held_out)):
        _encode_all(prepared, part, chats, config.max_seq_length)
        for chat in part.chats:
            likeness.add(chat, part is prepared.held_out)
    prepared.findings, prepared.not_compared = likeness.findings(), likeness.left_out
    return prepared


def _parts(
    prepared: Prepared, read: ReadResult, held_out_read: ReadResult | None, share: float
) -> tuple[list[Chat], list[Chat]]:
    for each in (read, held_out_read):
        if each is not None:
            prepared.problems += each.problems
            prepared.shapes |= each.shapes
            prepared.duplicates += each.duplicates
    if held_out_read is None:
        return split(read.chats, share)
    trained_on = {content_hash(chat) for chat in read.chats}
    prepared.in_both = [chat.where for chat in held_out_read.chats if content_hash(chat) in trained_on]
    return list(read.chats), [chat for chat in held_out_read.chats if content_hash(chat) not in trained_on]


def _encode_all(prepared: Prepared, part: Part, chats: Sequence[Chat], longest: int) -> None:
    encoder = Encoder(prepared.template, prepared.tokenizer)
    for chat, first in zip(chats, encoder.encode_all(chats), strict=True):
        try:
            fitting, encoded = _fit(encoder, chat, first, longest)
        except (TemplateError, DataError) as error:
            prepared.problems.append(Problem(chat.source, chat.line, "template", error.cause))
            continue
        if encoded is None:
            prepared.too_long.append(chat.where)
            continue
        if not any(encoded.labelled):
            prepared.problems.append(Problem(chat.source, chat.line, "no-label", "no token of it would be trained on"))
            continue
        if fitting is not chat:
            prepared.shortened.append((chat.where, len(chat.messages) - len(fitting.messages)))
        part.chats.append(fitting)
        part.encoded.append(encoded)


def _fit(
    encoder: Encoder, chat: Chat, encoded: EncodedChat | TemplateError | DataError, longest: int
) -> tuple[Chat, EncodedChat | None]:
    """The chat, or as many whole turns of its beginning as fit, ending with an answer; None when none do."""
    if not isinstance(encoded, EncodedChat):
        raise encoded
    if len(encoded.ids) <= longest:
        return chat, encoded
    answers = [index for index, message in enumerate(chat.messages) if message.role == "assistant"]
    for last in reversed(answers[:-1]):
        if chat.messages[last].tool_calls:
            continue  # a call without its result is no end of a chat
        shorter = dataclasses.replace(chat, messages=chat.messages[: last + 1])
        encoded = encoder.encode(shorter)
        if len(encoded.ids) <= longest:
            return shorter, encoded
    return chat, None


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
        reason = f"{len(prepared.too_long)} are too long" if prepared.too_long else "none could be used"
        raise DataError(f"no chat is left to train on: {reason}", "Raise --max-seq-length, or mend the chats.")
