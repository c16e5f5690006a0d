"""Encode chats: render them, locate the answers, and turn both into token ids with labels.

Tokens come from the whole text, as a server tokenizes it. `strategies` has the ways to get them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError, TemplateError
from kolotune.foundation.typed_storage import JsonObject

from ..chat import Chat
from ..templates.call_ids import CallIds, call_ids_of, with_accepted_ids
from ..templates.loss_mask import AnswerLocator, LocatedChat
from ..templates.signature_cache import SignatureCache
from ..templates.template import ChatTemplate
from .answers_apart import ApartEncoder, ChatApart
from .backend import SpecialToken, bare, special_tokens_of
from .encoded_chat import EncodedChat
from .labels import Labeller
from .prompt_ends import PromptEnds
from .strategies import ByOffsets, ByTokenBytes, ByWordCache, ChatToEncode, Encoding, SpecialTextAsPlain, Strategy
from .token_bytes import TokenBytes
from .word_cache import find_word_cache

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class Encoder:
    """Encodes chats with one template and one tokenizer. Can be sent to another process.

    The settings of the tokenizer's backend are changed while chats are encoded, and restored afterwards: don't use
    one tokenizer from two threads.

    Args:
        template: The base model's template, with the date frozen.
        tokenizer: The base model's tokenizer.
        learns_empty_thoughts: Whether the loss falls on the empty thought that a template writes before an answer
            without one.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast, learns_empty_thoughts: bool = False
    ) -> None:
        self._set_up(template, tokenizer.backend_tokenizer, special_tokens_of(tokenizer), learns_empty_thoughts)

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.template, self._backend, self._special, self._learns_empty_thoughts)

    def _set_up(
        self,
        template: ChatTemplate,
        backend: Tokenizer,
        special: Mapping[str, SpecialToken],
        learns_empty_thoughts: bool,
    ) -> None:
        self.template, self._backend, self._special = template, backend, special
        self._learns_empty_thoughts = learns_empty_thoughts
        names = frozenset(special)
        token_bytes = TokenBytes(backend)
        with bare(backend):
            words = find_word_cache(backend)
        self._locator = AnswerLocator(template, names)
        added = words.added if words is not None else frozenset()
        self._signatures = SignatureCache(self._locator, names, added)
        # If the tokenizer itself does not know a named special token, its text is more than this token.
        if words is not None and not names <= words.added:
            words = None
        labeller = Labeller(PromptEnds(backend, _texts_of_added(backend)), learns_empty_thoughts)
        self._apart = ApartEncoder(backend, special, token_bytes, words, learns_empty_thoughts)
        self._strategies: list[Strategy] = [
            SpecialTextAsPlain(backend, special, self._locator.special_pattern, labeller),
            ByTokenBytes(backend, token_bytes, labeller),
            ByOffsets(backend, self._locator, labeller),
        ]
        if words is not None:
            self._strategies.insert(0, ByWordCache(words, token_bytes, labeller))

    def encode(self, chat: Chat) -> EncodedChat:
        """Encode a chat, of which at least one turn is the assistant's.

        Raises:
            TemplateError: As in `AnswerLocator.locate`.
            DataError: A content contains the text of a special token and this tokenizer can't write that as plain
                text, or the tokens don't decode to the text.
        """
        (encoded,) = self.encode_all([chat])
        if isinstance(encoded, EncodedChat):
            return encoded
        raise encoded

    def accepted(self, chat: Chat) -> Chat:
        """Return the chat with ids of calls that the template takes; the same object if it has such."""
        if chat.rejected:
            preferred, rejected = (
                self.accepted(dataclasses.replace(chat, rejected=())),
                self.accepted(chat.rejected_chat),
            )
            if (preferred.messages, rejected.messages) == (chat.messages, chat.rejected):
                return chat
            return dataclasses.replace(preferred, rejected=rejected.messages)
        if chat.is_plain or not any([message.tool_calls for message in chat.messages]):
            return chat
        return with_accepted_ids(chat, self._call_ids)

    @cached_property
    def _call_ids(self) -> CallIds:
        return call_ids_of(self.template)

    def encode_all(self, chats: Sequence[Chat]) -> list[Encoding]:
        """Encode each chat, or return the error that `encode` would raise."""
        accepted = [self.accepted(chat) for chat in chats]
        results: list[Encoding | ChatApart | ChatToEncode] = [self._locate_answers(chat) for chat in accepted]
        with bare(self._backend):
            for strategy in self._strategies:
                pending = [(at, chat) for at, chat in enumerate(results) if isinstance(chat, ChatToEncode)]
                encodings = strategy.encode([chat for _, chat in pending])
                for (at, _), encoding in zip(pending, encodings, strict=True):
                    if encoding is not None:
                        results[at] = encoding
            encoded = [self._encode_apart(result) if isinstance(result, ChatApart) else result for result in results]
        return [result for result in encoded if not isinstance(result, ChatToEncode)]

    def prompt_ids(
        self, messages: Sequence[JsonObject], tools: Sequence[JsonObject] | None = None, thinks: bool = False
    ) -> list[int]:
        """Return the tokens of the prompt for an answer to these turns, as a server renders and encodes it.

        A BOS token is there if the template writes one. Special tokens that a content has are special.

        Args:
            messages: The turns, as the template gets them.
            tools: Tool definitions.
            thinks: As for `ChatTemplate.render`.

        Raises:
            TemplateError: The template refuses the turns.
            DataError: A text contains half a character.
        """
        text = self.template.render(messages, tools, add_generation_prompt=True, thinks=thinks)
        with bare(self._backend):
            return self._apart.prompt_ids(text)

    def _locate_answers(self, chat: Chat) -> ChatToEncode | ChatApart | TemplateError:
        try:
            masked = self._signatures.render(chat) or self._locator.locate(chat)
        except TemplateError as error:
            return error
        if isinstance(masked, LocatedChat) and masked.reason is not None:
            return ChatApart(chat, masked.apart, masked.reason, masked.dropped_thoughts)
        if not chat.is_plain and any([message.weight < 1 for message in chat.messages]):
            weights = tuple([message.weight for message in chat.messages if message.role == "assistant"])
            masked = dataclasses.replace(masked, given_weights=weights)
        return ChatToEncode(chat, masked)

    def _encode_apart(self, chat: ChatApart) -> Encoding:
        try:
            return self._apart.encode(chat)
        except DataError as error:
            return error


def _texts_of_added(backend: Tokenizer) -> list[str]:
    return [str(token) for token in backend.get_added_tokens_decoder().values()]


def _restored(
    template: ChatTemplate, backend: Tokenizer, special: Mapping[str, SpecialToken], learns_empty_thoughts: bool
) -> Encoder:
    encoder = Encoder.__new__(Encoder)
    encoder._set_up(template, backend, special, learns_empty_thoughts)
    return encoder
