"""Chats that need no rendering: what a template writes around the texts of all chats of one form.

A form is the roles of a chat's turns. For each form it is found out once what the template writes
(`ChatTemplate.around`) and where the answers begin and end in it (`masking.locate`, of a sample). A template that only
passes the texts on does the same for every other chat of that form. Where it does more, where a chat has more than
roles and texts, or where a text holds a special token, each chat is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kolotune.foundation.errors import TemplateError

from ..chat import Chat, Message
from .loss_mask import Located, locate, pattern_of
from .rendering import Span
from .template import ChatTemplate

_MOST = 10_000  # forms that are kept
_THINKING = "</think>"  # in an answer it is told apart from the rest: see `rendering`
_Place = tuple[int, int]  # the number of a piece, and a place in it


@dataclass(frozen=True)
class Placed:
    """A chat as the template writes it; all positions count characters.

    Attributes:
        text: the whole rendering.
        parts: `text` taken apart: plain text and special token in turns.
        spans, turn_starts: see `Located`.
    """

    text: str
    parts: list[str]
    spans: list[Span]
    turn_starts: list[int]


@dataclass(frozen=True)
class _Written:
    """What a template writes around the contents of turns: see `ChatTemplate.around`."""

    pieces: list[str]
    contents: list[tuple[int, bool]]

    def fill(self, texts: Sequence[str]) -> tuple[str, list[int]]:
        """The rendering with these texts, and where each piece begins in it."""
        out, at, begins = [self.pieces[0]], len(self.pieces[0]), [0]
        for (turn, trimmed), piece in zip(self.contents, self.pieces[1:], strict=True):
            text = texts[turn].strip() if trimmed else texts[turn]
            out += (text, piece)
            at += len(text)
            begins.append(at)
            at += len(piece)
        return "".join(out), begins

    def begins_with(self, other: _Written) -> bool:
        """Whether this begins with the other one, whatever the texts are."""
        last = len(other.contents)
        return (
            self.contents[:last] == other.contents
            and self.pieces[:last] == other.pieces[:last]
            and self.pieces[last].startswith(other.pieces[last])
        )

    def place(self, begins: Sequence[int], at: int) -> _Place | None:
        """The piece in which a place of the filled rendering is, or at whose end; None in a content."""
        for number, (begin, piece) in enumerate(zip(begins, self.pieces, strict=True)):
            if begin <= at <= begin + len(piece):
                return number, at - begin
        return None


@dataclass(frozen=True)
class _Form:
    """What a template writes for chats of one form.

    Attributes:
        written: the text around the contents.
        special: the special tokens in it, in their order.
        spans, turn_starts: as in `Placed`.
    """

    written: _Written
    special: list[str]
    spans: list[tuple[_Place, _Place]]
    turn_starts: list[_Place]


class Forms:
    """The forms of the chats that one template writes.

    Args:
        template: the template.
        special: the texts of the tokenizer's special tokens.
        added: those of all its added tokens: renderings are taken apart at these too.
    """

    def __init__(self, template: ChatTemplate, special: frozenset[str], added: frozenset[str]) -> None:
        self._template, self._special = template, special
        self._known: dict[tuple[str, ...], _Form | None] = {}
        self._prompts: dict[tuple[str, ...], _Written | None] = {}
        self._pattern = re.compile(f"({pattern_of(special | added).pattern})")

    def place(self, chat: Chat) -> Placed | None:
        """The chat as the template writes it; None when it has to be rendered."""
        if chat.tools or not all(map(_passes, chat.messages)):
            return None
        roles = tuple([message.role for message in chat.messages])
        form = self._known[roles] if roles in self._known else self._learn(roles)
        if form is None:
            return None
        text, begins = form.written.fill([message.content for message in chat.messages])
        parts = self._pattern.split(text)
        if parts[1::2] != form.special:
            return None  # a content holds one
        spans = [(begins[a] + b, begins[c] + d) for (a, b), (c, d) in form.spans]
        return Placed(text, parts, spans, [begins[piece] + at for piece, at in form.turn_starts])

    def _learn(self, roles: tuple[str, ...]) -> _Form | None:
        if len(self._known) >= _MOST:
            self._known.clear()
            self._prompts.clear()
        try:
            self._known[roles] = self._form(roles)
        except TemplateError:
            self._known[roles] = None  # what is wrong is said of each chat when it is rendered
        return self._known[roles]

    def _form(self, roles: tuple[str, ...]) -> _Form | None:
        whole = self._written(roles)
        if whole is None:
            return None
        texts = [f"\ue000{number}\ue001" for number in range(len(roles))]
        found = locate(Chat(tuple(map(Message, roles, texts))), self._template, self._special)
        text, begins = whole.fill(texts)
        if text != found.text or not self._prompts_prove(whole, roles, texts, found):
            return None
        spans = [(whole.place(begins, start), whole.place(begins, end)) for start, end in found.spans]
        starts = [whole.place(begins, start) for start in found.turn_starts]
        # An exchange begins behind white space: at the end of a piece it would depend on what follows.
        if any(at is not None and at[1] == len(whole.pieces[at[0]]) for at in starts[1:]):
            return None
        fixed = [(start, end) for start, end in spans if start is not None and end is not None]
        placed = [at for at in starts if at is not None]
        if len(fixed) < len(spans) or len(placed) < len(starts):
            return None
        return _Form(whole, self._pattern.split(text)[1::2], fixed, placed)

    def _written(self, roles: tuple[str, ...], prompt: bool = False) -> _Written | None:
        around = self._template.around(roles, prompt)
        return None if around is None else _Written(*around)

    def _prompts_prove(self, whole: _Written, roles: tuple[str, ...], texts: list[str], found: Located) -> bool:
        """Whether each answer begins where the prompt ends that it is served with, whatever the texts are."""
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        for number, (start, _) in zip(answers, found.spans, strict=True):
            asked = roles[:number]
            if asked and asked not in self._prompts:
                self._prompts[asked] = self._written(asked, prompt=True)
            prompt = self._prompts[asked] if asked else None
            if prompt is None or not whole.begins_with(prompt) or len(prompt.fill(texts)[0]) != start:
                return False
        return True


def _passes(message: Message) -> bool:
    """Whether a message may have been the sample's."""
    text = message.content
    return (
        message.is_plain
        and bool(text)
        and not text.isspace()
        and not (message.role == "assistant" and _THINKING in text)
    )
