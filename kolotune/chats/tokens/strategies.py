"""Ways to encode a chat whose answers are located. `Encoder` tries them in order; each takes the chats that it can.

1. `ByWordCache`: from the tokens of its words, which are known from earlier chats. The fastest.
2. `SpecialTextAsPlain`: a chat whose content has the text of a special token.
3. `ByTokenBytes`: the tokenizer encodes the whole text; the bytes of the tokens prove that they are the text.
4. `ByOffsets`: the tokenizer says where each token is. For tokenizers that don't work on bytes; takes every chat.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from kolotune.foundation.errors import DataError, TemplateError

from ..chat import Chat
from ..templates.loss_mask import AnswerLocator, LocatedChat
from ..templates.signature_cache import SignedChat
from .answers_apart import ChatApart, take_apart
from .backend import SpecialToken, check_decodes
from .encoded_chat import EncodedChat, packed
from .labels import Labeller
from .special_text import contains_special_text, encode_as_plain_text
from .token_bytes import TokenBytes
from .word_cache import WordCache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encoding: TypeAlias = EncodedChat | TemplateError | DataError
"""An encoded chat, or why it can't be encoded."""


@dataclass(frozen=True)
class ChatToEncode:
    """A chat in one piece, and its rendering with the answers located."""

    chat: Chat
    masked: SignedChat | LocatedChat


class Strategy(Protocol):
    """One way to encode chats."""

    def encode(self, chats: Sequence[ChatToEncode]) -> list[Encoding | ChatApart | None]:
        """Encode each chat, or take its answers apart; None for those that are left to the next strategy."""


@dataclass
class ByWordCache:
    """Encodes a chat from the tokens of its words."""

    words: WordCache
    token_bytes: TokenBytes
    labeller: Labeller

    def encode(self, chats: Sequence[ChatToEncode]) -> list[Encoding | ChatApart | None]:
        ids = [self.words.ids(chat.masked.parts) if isinstance(chat.masked, SignedChat) else None for chat in chats]
        return _label_known(chats, ids, self.token_bytes, self.labeller)


@dataclass
class SpecialTextAsPlain:
    """Encodes a chat whose content has the text of a special token."""

    backend: Tokenizer
    special: Mapping[str, SpecialToken]
    pattern: re.Pattern[str]
    labeller: Labeller

    def encode(self, chats: Sequence[ChatToEncode]) -> list[Encoding | ChatApart | None]:
        return [self._encode(chat) for chat in chats]

    def _encode(self, chat: ChatToEncode) -> Encoding | ChatApart | None:
        masked = chat.masked
        if not isinstance(masked, LocatedChat):
            return None  # a chat that has a signature contains none
        try:
            if not contains_special_text(chat.chat, self.pattern):
                return None
            tokens = encode_as_plain_text(masked.text, masked.slots, masked.skeleton, self.backend, self.special)
            check_decodes(masked.text, masked.skeleton, tokens.ids, self.backend)
        except DataError as error:
            return error
        encoded = self.labeller.by_known_offsets(masked, tokens)
        if encoded is None:
            return take_apart(chat.chat, masked)
        return dataclasses.replace(encoded, special_in_content=True)


@dataclass
class ByTokenBytes:
    """Encodes whole texts in one batch, and keeps what the bytes of the tokens prove to be the text."""

    backend: Tokenizer
    token_bytes: TokenBytes
    labeller: Labeller

    def encode(self, chats: Sequence[ChatToEncode]) -> list[Encoding | ChatApart | None]:
        return _label_known(chats, self._ids([chat.masked.text for chat in chats]), self.token_bytes, self.labeller)

    def _ids(self, texts: list[str]) -> list[bytes | None]:
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            return [None] * len(texts)  # one contains half a character; `ByOffsets` reports which
        proven: list[bytes | None] = []
        for text, encoding in zip(texts, encodings, strict=True):
            ids = encoding.ids
            parts = self.token_bytes.of(ids)
            is_text = parts is not None and b"".join(parts) == text.encode() and not self.token_bytes.changes(text)
            proven.append(packed(ids) if is_text else None)
        return proven


@dataclass
class ByOffsets:
    """Encodes a chat with the offsets that the tokenizer gives."""

    backend: Tokenizer
    locator: AnswerLocator
    labeller: Labeller

    def encode(self, chats: Sequence[ChatToEncode]) -> list[Encoding | ChatApart | None]:
        return [self._encode(chat) for chat in chats]

    def _encode(self, chat: ChatToEncode) -> Encoding | ChatApart:
        try:
            located = chat.masked if isinstance(chat.masked, LocatedChat) else self.locator.locate(chat.chat)
            located = dataclasses.replace(located, given_weights=chat.masked.given_weights)
            return self.labeller.by_offsets(located, self.backend) or take_apart(chat.chat, located)
        except (TemplateError, DataError) as error:
            return error


def _label_known(
    chats: Sequence[ChatToEncode], ids: Sequence[bytes | None], token_bytes: TokenBytes, labeller: Labeller
) -> list[Encoding | ChatApart | None]:
    """Label the chats whose ids are known."""
    known = [(chat.masked, packed_ids) for chat, packed_ids in zip(chats, ids, strict=True) if packed_ids is not None]
    encoded = iter(labeller.by_bytes(known, token_bytes))
    return [
        None if packed_ids is None else next(encoded) or take_apart(chat.chat, chat.masked)
        for chat, packed_ids in zip(chats, ids, strict=True)
    ]
