"""Encode chats: render them, locate the answers, and turn both into token ids with labels.

Tokens come from the whole text, as a server tokenizes it. `strategies` has the ways to get them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kolotune.foundation.errors import TemplateError

from ..chat import Chat
from ..templates.loss_mask import AnswerLocator
from ..templates.signature_cache import SignatureCache
from ..templates.template import ChatTemplate
from .backend import SpecialToken, bare, special_tokens_of
from .encoded_chat import EncodedChat
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
    """

    def __init__(self, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
        self._set_up(template, tokenizer.backend_tokenizer, special_tokens_of(tokenizer))

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.template, self._backend, self._special)

    def _set_up(self, template: ChatTemplate, backend: Tokenizer, special: Mapping[str, SpecialToken]) -> None:
        self.template, self._backend, self._special = template, backend, special
        names = frozenset(special)
        token_bytes = TokenBytes(backend)
        with bare(backend):
            words = find_word_cache(backend)
        self._locator = AnswerLocator(template, names)
        self._signatures = SignatureCache(self._locator, names, words.added if words is not None else frozenset())
        self._strategies: list[Strategy] = [
            SpecialTextAsPlain(backend, special, self._locator.special_pattern),
            ByTokenBytes(backend, token_bytes),
            ByOffsets(backend, self._locator),
        ]
        # If the tokenizer itself does not know a named special token, its text is more than this token.
        if words is not None and names <= words.added:
            self._strategies.insert(0, ByWordCache(words, token_bytes))

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

    def encode_all(self, chats: Sequence[Chat]) -> list[Encoding]:
        """Encode each chat, or return the error that `encode` would raise."""
        results: list[Encoding | ChatToEncode] = [self._locate_answers(chat) for chat in chats]
        with bare(self._backend):
            for strategy in self._strategies:
                pending = [(at, chat) for at, chat in enumerate(results) if isinstance(chat, ChatToEncode)]
                encodings = strategy.encode([chat for _, chat in pending])
                for (at, _), encoding in zip(pending, encodings, strict=True):
                    if encoding is not None:
                        results[at] = encoding
        return [result for result in results if not isinstance(result, ChatToEncode)]

    def _locate_answers(self, chat: Chat) -> ChatToEncode | TemplateError:
        try:
            return ChatToEncode(chat, self._signatures.render(chat) or self._locator.locate(chat))
        except TemplateError as error:
            return error


def _restored(template: ChatTemplate, backend: Tokenizer, special: Mapping[str, SpecialToken]) -> Encoder:
    encoder = Encoder.__new__(Encoder)
    encoder._set_up(template, backend, special)
    return encoder
