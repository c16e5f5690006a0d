"""Render chats without running the template: by the template signature of their roles.

A signature (see `signature`) is found once for each sequence of roles, together with where the answers start and end
in it (`loss_mask`, of a sample). Where the template only passes texts on, it does the same for every other chat with
these roles. A chat is rendered in full where the template does more, where it has more than roles and texts, or where
a text contains a special token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kolotune.foundation.errors import TemplateError

from ..chat import Chat, Message
from .loss_mask import AnswerLocator, MaskedChat
from .reply_format import token_pattern
from .signature import PiecePosition, TemplateSignature
from .thoughts import writes_thought

_MOST_SIGNATURES = 10_000

Roles = tuple[str, ...]


@dataclass(frozen=True)
class SignedChat(MaskedChat):
    """A masked chat that was rendered by its signature.

    Attributes:
        parts: `text` taken apart: plain text and special token in alternation.
        prompt_ends: For each answer, the end of its prompt, from the last special token on; None if a text of the
            chat is in between.
    """

    parts: list[str]
    prompt_ends: tuple[str | None, ...]


@dataclass(frozen=True)
class _MaskedSignature:
    """A signature with its loss mask.

    Attributes:
        signature: The text around the contents.
        special: The special tokens in it, in order.
        spans: Start and end of each assistant turn.
        empty_thoughts: The length of the empty thought at the start of each of these turns.
        prompt_ends: What the template writes last before each of these turns, from the last special token on; None if a
            text of the chat is in between.
    """

    signature: TemplateSignature
    special: list[str]
    spans: list[tuple[PiecePosition, PiecePosition]]
    empty_thoughts: tuple[int, ...]
    prompt_ends: tuple[str | None, ...]


class SignatureCache:
    """The signatures of one template, by roles.

    Args:
        locator: Finds the answers in what the template writes.
        special: The texts of the tokenizer's special tokens.
        added: The texts of all its added tokens; renderings are taken apart at these too.
    """

    def __init__(self, locator: AnswerLocator, special: frozenset[str], added: frozenset[str]) -> None:
        self._locator = locator
        self._known: dict[Roles, _MaskedSignature | None] = {}
        self._prompts: dict[Roles, TemplateSignature | None] = {}
        self._finished: dict[Roles, TemplateSignature | None] = {}
        self._pattern = re.compile(f"({token_pattern(special | added).pattern})")

    def render(self, chat: Chat) -> SignedChat | None:
        """Return the chat as the template writes it; None if the template has to render it."""
        if not (chat.is_plain or _is_text(chat)) or not all(map(_is_covered, chat.messages)):
            return None
        roles = tuple([message.role for message in chat.messages])
        masked = self._known[roles] if roles in self._known else self._learn(roles)
        if masked is None:
            return None
        text, starts = masked.signature.fill([message.content for message in chat.messages])
        parts = self._pattern.split(text)
        if parts[1::2] != masked.special:
            return None  # a content contains one
        spans = [(starts[a] + b, starts[c] + d) for (a, b), (c, d) in masked.spans]
        return SignedChat(text, tuple(spans), masked.empty_thoughts, parts, masked.prompt_ends)

    def _learn(self, roles: Roles) -> _MaskedSignature | None:
        if len(self._known) >= _MOST_SIGNATURES:
            self._known.clear()
            self._prompts.clear()
            self._finished.clear()
        try:
            self._known[roles] = self._masked(roles)
        except TemplateError:
            self._known[roles] = None  # each chat reports what is wrong when it is rendered
        return self._known[roles]

    def _masked(self, roles: Roles) -> _MaskedSignature | None:
        """Find the signature for these roles, and prove its loss mask on a sample."""
        signature = self._locator.template.signature(roles, prompt=False)
        if signature is None:
            return None
        texts = [f"\ue000{number}\ue001" for number in range(len(roles))]
        sample = self._locator.locate(Chat(tuple(map(Message, roles, texts))))
        text, starts = signature.fill(texts)
        if text != sample.text or sample.apart or not self._prompts_end_at_answers(signature, roles, texts, sample):
            return None
        spans, prompt_ends = [], []
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        for number, (start, end) in zip(answers, sample.spans, strict=True):
            first, last = signature.position(starts, start), signature.position(starts, end)
            if first is None or last is None or not self._is_finished_so(signature, roles[: number + 1], last):
                return None
            spans.append((first, last))
            before = signature.pieces[first[0]][: first[1]]
            tokens = list(self._pattern.finditer(before))
            prompt_ends.append(before[tokens[-1].start() :] if tokens else None)
        special = self._pattern.split(text)[1::2]
        return _MaskedSignature(signature, special, spans, sample.empty_thoughts, tuple(prompt_ends))

    def _prompts_end_at_answers(
        self, signature: TemplateSignature, roles: Roles, texts: list[str], sample: MaskedChat
    ) -> bool:
        """Whether each answer starts where the prompt ends that it is served with, whatever the texts are."""
        answers = [number for number, role in enumerate(roles) if role == "assistant"]
        for number, (start, _) in zip(answers, sample.spans, strict=True):
            before = roles[:number]
            if before and before not in self._prompts:
                self._prompts[before] = self._locator.template.signature(before, prompt=True)
            prompt = self._prompts[before] if before else None
            if prompt is None or not signature.starts_with(prompt) or len(prompt.fill(texts)[0]) != start:
                return False
        return True

    def _is_finished_so(self, signature: TemplateSignature, roles: Roles, end: PiecePosition) -> bool:
        """Whether a chat that stops after an answer has the same text up to the answer's end."""
        if roles not in self._finished:
            try:
                self._finished[roles] = self._locator.template.signature(roles, prompt=False)
            except TemplateError:
                self._finished[roles] = signature  # the template writes this answer only with what follows
        finished = self._finished[roles]
        if finished is None or len(finished.pieces) <= end[0]:
            return False
        return signature.until(*end) == finished.until(*end)


def _is_text(chat: Chat) -> bool:
    """Whether the template gets roles and texts alone."""
    return not chat.tools and all([message.is_plain for message in chat.messages])


def _is_covered(message: Message) -> bool:
    """Whether the template treats the text of a message as it treated the sample's."""
    text = message.content
    return bool(text) and not text.isspace() and not (message.role == "assistant" and writes_thought(text))
