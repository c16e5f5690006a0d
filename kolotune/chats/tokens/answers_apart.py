"""Encode answers apart: each is a sequence of its own, behind the tokens of its prompt as the server encodes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError

from ..chat import Chat
from ..templates.answer_search import TrainedAnswer
from ..templates.loss_mask import ApartReason, LocatedChat, MaskedChat
from ..templates.reply_format import token_pattern
from .backend import OffsetTokens, SpecialToken, check_decodes, encode_text
from .encoded_chat import EncodedChat, packed, packed_weights
from .special_text import contains_special_text, encode_as_plain_text
from .token_bytes import TokenBytes, decodes_bytes
from .word_cache import WordCache

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class ChatApart:
    """A chat whose answers are encoded apart.

    Attributes:
        chat: The chat.
        answers: Its answers.
        reason: Why they are encoded apart.
        dropped_thoughts: As in `EncodedChat`.
    """

    chat: Chat
    answers: tuple[TrainedAnswer, ...]
    reason: ApartReason
    dropped_thoughts: int = 0

    @property
    def trained(self) -> list[tuple[TrainedAnswer, float]]:
        """The answers that are trained on, each with its weight; those of others are in prompts only."""
        weights = [message.weight for message in self.chat.messages if message.role == "assistant"]
        return [(answer, weight) for answer, weight in zip(self.answers, weights, strict=True) if weight]


def take_apart(chat: Chat, masked: MaskedChat) -> ChatApart:
    """Return a chat in one piece with its answers apart, since a prompt and an answer would share a token."""
    located = masked if isinstance(masked, LocatedChat) else None
    slots = located.slots if located is not None else None
    answers = []
    for (start, end), thought in zip(masked.spans, masked.empty_thoughts, strict=True):
        answers.append(
            TrainedAnswer(
                masked.text[:start],
                masked.text[start:end],
                thought,
                True,
                None if slots is None else tuple((a - start, b - start) for a, b in slots if start <= a and b <= end),
                located.skeleton if located is not None else "",
                None if slots is None else tuple(slot for slot in slots if slot[1] <= start),
            )
        )
    return ChatApart(chat, tuple(answers), ApartReason.BOUNDARY)


class ApartEncoder:
    """Encodes answers apart.

    Args:
        backend: The tokenizer; must be bare while it is used.
        special: Its special tokens by their text.
        token_bytes: The bytes of its tokens.
        words: The tokens of words; None if it is unknown how the tokenizer splits texts.
        learns_empty_thoughts: Whether the loss falls on empty thoughts, too.
    """

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, SpecialToken],
        token_bytes: TokenBytes,
        words: WordCache | None,
        learns_empty_thoughts: bool,
    ) -> None:
        self._backend, self._special, self._token_bytes, self._words = backend, special, token_bytes, words
        self._learns_empty_thoughts = learns_empty_thoughts
        self._pattern = token_pattern(frozenset(special))
        added = words.added if words is not None else frozenset()
        self._between_words = re.compile(f"({token_pattern(added).pattern})")

    def encode(self, apart: ChatApart) -> EncodedChat:
        """Encode each answer behind its prompt.

        Raises:
            DataError: As in `Encoder.encode`.
        """
        has_special_text = contains_special_text(apart.chat, self._pattern)
        ids: list[int] = []
        labels = bytearray()
        ends = []
        lighter = []
        answers = [answer for answer, _ in apart.trained]
        for answer, weight in apart.trained:
            if has_special_text:
                prompt = self._as_plain_text(answer.prompt, answer.prompt_texts, answer.skeleton).ids
                tokens = self._as_plain_text(answer.answer, answer.texts, answer.skeleton)
            else:
                prompt = self.prompt_ids(answer.prompt)
                tokens = self._answer_tokens(answer.answer, answer.prompt)
            self._check(answer, [*prompt, *tokens.ids])
            thought = 0 if self._learns_empty_thoughts else answer.empty_thought
            ids += prompt + tokens.ids
            labels += bytes(len(prompt)) + bytes(end > thought for end in tokens.ends)
            if weight < 1:
                lighter.append((len(ids) - len(tokens.ids), len(ids), weight))
            ends.append(len(ids))
        masked = 0 if self._learns_empty_thoughts else sum(bool(answer.empty_thought) for answer in answers)
        has_several = len(ends) > 1
        return EncodedChat(
            packed(ids),
            bytes(labels),
            has_special_text,
            tuple(ends) if has_several else (),
            apart.reason if has_several else None,
            masked,
            apart.dropped_thoughts,
            packed_weights(labels, lighter),
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens of a rendered prompt, as a server encodes it.

        Raises:
            DataError: It contains half a character.
        """
        if self._words is not None:
            known = self._words.ids(self._between_words.split(prompt))
            if known is not None:
                return memoryview(known).cast("i").tolist()
        return encode_text(self._backend, prompt).ids

    def _answer_tokens(self, answer: str, prompt: str) -> OffsetTokens:
        """Return the tokens of an answer, as a model writes them behind a prompt.

        Raises:
            DataError: The tokenizer has no such tokens.
        """
        if decodes_bytes(self._backend):
            return encode_text(self._backend, answer)
        # SentencePiece writes the start of a text as if white space were before it. So something is encoded before the
        # answer that does not merge with it: the last character of the prompt, or its last special token.
        for before in (prompt[-1:], *(match[0] for match in list(self._pattern.finditer(prompt))[-1:])):
            whole, head = encode_text(self._backend, before + answer), encode_text(self._backend, before)
            count = len(head.ids)
            if whole.ids[:count] == head.ids and whole.starts[count : count + 1] == [len(before)]:
                behind = OffsetTokens()
                spans = list(zip(whole.starts[count:], whole.ends[count:], strict=True))
                behind.add(whole.ids[count:], spans, -len(before))
                return behind
        raise DataError("the tokenizer can't encode an answer without the end of its prompt")

    def _as_plain_text(self, text: str, slots: tuple[tuple[int, int], ...] | None, skeleton: str) -> OffsetTokens:
        return encode_as_plain_text(text, slots, skeleton, self._backend, self._special)

    def _check(self, answer: TrainedAnswer, ids: list[int]) -> None:
        """Check that the tokens are those of the text."""
        text = answer.prompt + answer.answer
        parts = self._token_bytes.of(ids)
        if parts is None or b"".join(parts) != text.encode() or self._token_bytes.changes(text):
            check_decodes(text, answer.skeleton, ids, self._backend)
