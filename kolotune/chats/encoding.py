"""Rendered chats as token ids with labels.

Tokens come from the whole text, as a server tokenizes it. Where the tokenizer works on bytes, the ids are proven to be
the text, and each label found, by adding up the bytes of the tokens; other tokenizers are asked where each token
stands, or for prompts and answers apart.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from ..errors import DataError, TemplateError
from . import Chat
from .masking import Located, locate, pattern_of
from .rendering import Span
from .template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class EncodedChat:
    """A chat as tokens.

    Attributes:
        ids: the token ids of the whole rendering.
        labelled: for each id, whether the loss falls on it; as long as `ids`.
        turn_starts: the index into `ids` where each exchange starts: a user's turn and all up to the next
            user's turn that follows an answer. The first is 0. Cutting there leaves whole exchanges.
        special_in_content: a content holds the text of a special token; it was encoded as plain text.
        boundary_merge: a token holds both the end of a prompt and the start of an answer. It is not
            labelled, and the served prompt will end with another token than the one trained on.
    """

    ids: list[int]
    labelled: list[bool]
    turn_starts: list[int]
    special_in_content: bool
    boundary_merge: bool


class Encoder:
    """Encodes chats with one template and one tokenizer; can be sent to another process.

    Settings of the tokenizer's backend are changed while chats are encoded and put back: don't use one tokenizer from
    two threads.

    Args:
        template: the base model's template, with the date frozen.
        tokenizer: the base model's tokenizer.
    """

    def __init__(self, template: ChatTemplate, tokenizer: PreTrainedTokenizerFast) -> None:
        self.template = template
        self._backend: Any = tokenizer.backend_tokenizer
        self._special = _special_tokens(tokenizer)
        self._names = frozenset(self._special)
        self._bytes = _TokenBytes(self._backend)

    def encode(self, chat: Chat) -> EncodedChat:
        """Token ids of a chat, and which of them the loss falls on.

        Args:
            chat: the chat; at least one turn of it is the assistant's.

        Returns:
            ``ids`` and ``labelled``, both of one length T; see `EncodedChat`.

        Raises:
            TemplateError: see `locate`.
            DataError: a content holds the text of a special token and this tokenizer can't write that as plain
                text, or the tokens don't give the text back.
        """
        (encoded,) = self.encode_all([chat])
        if isinstance(encoded, EncodedChat):
            return encoded
        raise encoded

    def encode_all(self, chats: Sequence[Chat]) -> list[EncodedChat | TemplateError | DataError]:
        """Each chat encoded, or the error that `encode` would raise."""
        out: list[EncodedChat | TemplateError | DataError | None] = [None] * len(chats)
        plain: dict[int, Located] = {}
        with _bare(self._backend):
            for index, chat in enumerate(chats):
                try:
                    found = locate(chat, self.template, self._names)
                    if _special_in_content(chat, pattern_of(self._names)):
                        out[index] = self._with_special(found)
                    else:
                        plain[index] = found
                except (TemplateError, DataError) as error:
                    out[index] = error
            for (index, found), ids in zip(plain.items(), self._ids(plain.values()), strict=True):
                out[index] = self._by_bytes(found, ids) if ids is not None else None
                if out[index] is None:
                    try:
                        out[index] = self._by_places(found)
                    except DataError as error:
                        out[index] = error
        return [each for each in out if each is not None]

    def _ids(self, found: Iterable[Located]) -> list[list[int] | None]:
        texts = [each.text for each in found]
        try:
            return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (TypeError, UnicodeEncodeError):
            return [None] * len(texts)  # one of them holds half a character: `_by_places` tells which

    def _by_bytes(self, found: Located, ids: list[int]) -> EncodedChat | None:
        """Labels from the lengths of the tokens, for tokenizers that write bytes; None where they don't."""
        text, data = found.text, found.text.encode()
        parts = self._bytes.of(ids)
        if parts is None or b"".join(parts) != data or self._bytes.changes(text):
            return None
        ends = list(accumulate(map(len, parts), initial=0))

        def token_at(place: int) -> int:
            """The first token that begins at this character or behind it."""
            return bisect_left(ends, place if len(data) == len(text) else len(text[:place].encode()))

        labelled, merged = [False] * len(ids), False
        for start, end in found.spans:
            first, last = token_at(start), token_at(end)
            labelled[first:last] = [True] * (last - first)
            merged = merged or ends[first] != (start if len(data) == len(text) else len(text[:start].encode()))
        return EncodedChat(ids, labelled, [token_at(at) for at in found.turn_starts], False, merged)

    def _by_places(self, found: Located) -> EncodedChat:
        """Labels from prompts and answers encoded apart, or from where the tokenizer says that each token stands."""
        tokens = _encode(self._backend, found.text)
        labels = _labels_by_parts(self._backend, found, tokens.ids)
        _check_decodes(found, tokens.ids, self._backend)
        return _with_labels(found, tokens, labels, False)

    def _with_special(self, found: Located) -> EncodedChat:
        """A chat with a special token's text in its content."""
        tokens = _encode_apart(found, self._backend, self._special)
        _check_decodes(found, tokens.ids, self._backend)
        return _with_labels(found, tokens, None, True)


class _TokenBytes:
    """The bytes that each token stands for, where the tokenizer's decoder does no more than put them together."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}
        self._added: dict[int, bytes] = {}
        self._letters: dict[str, int] | None = None
        if repr(backend.decoder).startswith("ByteLevel("):
            self._added = {index: str(token).encode() for index, token in backend.get_added_tokens_decoder().items()}
            self._letters = _byte_letters()

    def of(self, ids: list[int]) -> list[bytes] | None:
        """The bytes of each token; None where this tokenizer has none."""
        known = self._known
        try:
            return [known[index] for index in ids]
        except KeyError:
            pass
        if self._letters is None:
            return None
        for index in ids:
            if index in known:
                continue
            letters = self._backend.id_to_token(index)
            if index in self._added:
                known[index] = self._added[index]
            elif letters is not None and all(letter in self._letters for letter in letters):
                known[index] = bytes(self._letters[letter] for letter in letters)
            else:
                return None
        return [known[index] for index in ids]

    def changes(self, text: str) -> bool:
        """Whether the tokenizer changes a text before it encodes it."""
        normalizer = self._backend.normalizer
        return normalizer is not None and normalizer.normalize_str(text) != text


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte: itself where it can be seen, else one from 256 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(other)}


def _with_labels(found: Located, tokens: _Tokens, labels: list[bool] | None, inside: bool) -> EncodedChat:
    merged = False
    if labels is None:
        labels = [any(start <= begin < end for start, end in found.spans) for begin in tokens.begins]
        places = list(zip(tokens.begins, tokens.ends, strict=True))
        merged = any(begin < start < end for begin, end in places for start, _ in found.spans)
    starts = [
        next((index for index, begin in enumerate(tokens.begins) if begin >= at), len(tokens.ids))
        for at in found.turn_starts
    ]
    return EncodedChat(tokens.ids, labels, starts, inside, merged)


@dataclass
class _Tokens:
    """Token ids with the characters that they stand for: begin and end of each."""

    ids: list[int]
    begins: list[int]
    ends: list[int]

    def add(self, ids: Sequence[int], offsets: Sequence[Span], base: int) -> None:
        self.ids += ids
        self.begins += [base + begin for begin, _ in offsets]
        self.ends += [base + end for _, end in offsets]


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """The special tokens of a tokenizer: text to (id, takes white space before it, behind it)."""
    found = {
        str(token.content): (index, bool(token.lstrip), bool(token.rstrip))
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for text in tokenizer.all_special_tokens:
        found.setdefault(str(text), (tokenizer.convert_tokens_to_ids(text), False, False))
    return found


@contextmanager
def _bare(backend: Any) -> Iterator[None]:
    """The tokenizer with nothing that cuts, fills up or rounds: a post-processor may trim white space off
    the offsets, and what an earlier caller asked for (truncation, padding) stays set in the backend."""
    post, as_text = backend.post_processor, backend.encode_special_tokens
    truncation, padding = backend.truncation, backend.padding
    backend.post_processor, backend.encode_special_tokens = None, False
    backend.no_truncation()
    backend.no_padding()
    try:
        yield
    finally:
        backend.post_processor, backend.encode_special_tokens = post, as_text
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _encode(backend: Any, text: str) -> _Tokens:
    """The whole text as one, special tokens parsed: as llama.cpp reads a rendered prompt."""
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError) as error:
        raise DataError("a text holds half a character (a lone surrogate)") from error
    tokens = _Tokens([], [], [])
    tokens.add(encoding.ids, encoding.offsets, 0)
    return tokens


def _labels_by_parts(backend: Any, found: Located, ids: list[int]) -> list[bool] | None:
    """Labels from encoding prompts and answers apart; None when that gives other ids than the whole."""
    bounds = [0, *(bound for span in found.spans for bound in span), len(found.text)]
    labels: list[bool] = []
    joined: list[int] = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        part = backend.encode(found.text[start:end], add_special_tokens=False).ids if end > start else []
        joined += part
        labels += [number % 2 == 1] * len(part)
    return labels if joined == ids else None


def _special_in_content(chat: Chat, pattern: re.Pattern[str]) -> bool:
    """Whether a text of the chat holds a special token's text.

    Raises:
        DataError: one stands where it can't be told from what the template writes.
    """
    for message in chat.messages:
        if not (message.tool_calls or message.name or message.tool_call_id):
            continue
        shell = json.dumps([message.tool_calls, message.name, message.tool_call_id], ensure_ascii=False)
        if match := pattern.search(shell):
            raise DataError(f"a tool call holds the text of the special token {match[0]}")
    if chat.tools and (match := pattern.search(json.dumps(chat.tools, ensure_ascii=False))):
        raise DataError(f"a tool's definition holds the text of the special token {match[0]}")
    texts = (text for message in chat.messages for text in (message.content, message.reasoning or ""))
    return any(pattern.search(text) for text in texts)


def _encode_apart(found: Located, backend: Any, special: Mapping[str, Any]) -> _Tokens:
    """The special tokens that the template wrote as such, all other text as plain text."""
    reason, pattern = "a message holds the text of a special token", pattern_of(frozenset(special))
    if found.slots is None:
        raise DataError(f"{reason}, which can't be told from those that the chat template writes")
    # What is done here is what the tokenizer itself does, or it is not done: seen on the skeleton, in which
    # all special tokens are the template's.
    sample = _encode_fragments(backend, found.skeleton, (), special)
    if sample.ids != backend.encode(found.skeleton, add_special_tokens=False).ids:
        raise DataError(f"{reason}, which this model's tokenizer can't write as plain text exactly")
    tokens = _encode_fragments(backend, found.text, found.slots, special)
    # Only those that the chat mentions: the unknown token may well stand for something else in it.
    texts = [found.text[start:end] for start, end in found.slots]
    mentioned = {token: special[token][0] for token in special if any(token in text for text in texts)}
    bounds = [0, *(bound for slot in found.slots for bound in slot), len(found.text)]
    pieces = [found.text[start:end] for start, end in list(pairwise(bounds))[::2]]
    written = sum(match[0] in mentioned for piece in pieces for match in pattern.finditer(piece))
    if sum(index in mentioned.values() for index in tokens.ids) != written:
        raise DataError(f"{reason}, which this model's tokenizer can't write as plain text")
    return tokens


def _encode_fragments(backend: Any, text: str, slots: Sequence[Span], special: Mapping[str, Any]) -> _Tokens:
    """Encode the special tokens outside of the slots as such, and the text between as plain text."""
    tokens = _Tokens([], [], [])
    bounds = [0, *(bound for slot in slots for bound in slot), len(text)]
    at = 0

    def plain(until: int) -> None:
        if until > at:
            encoding = backend.encode(text[at:until], add_special_tokens=False)
            tokens.add(encoding.ids, encoding.offsets, at)

    backend.encode_special_tokens = True
    try:
        for start, end in list(pairwise(bounds))[::2]:
            for match in pattern_of(frozenset(special)).finditer(text, start, end):
                index, left, right = special[match[0]]
                before, behind = text[at : match.start()], text[match.end() :]
                begin = at + len(before.rstrip()) if left else match.start()
                plain(begin)
                at = match.end() + (len(behind) - len(behind.lstrip()) if right else 0)
                tokens.add([index], [(begin, at)], 0)
        plain(len(text))
    finally:
        backend.encode_special_tokens = False
    return tokens


def _check_decodes(found: Located, ids: list[int], backend: Any) -> None:
    """The ids give the text back, wherever this tokenizer gives texts back at all."""
    if "ByteLevel" not in repr(backend.decoder):
        return  # SentencePiece writes a space and ▁ alike

    def same(text: str, ids: list[int]) -> bool:
        plain = backend.normalizer.normalize_str(text) if backend.normalizer else text
        return bool(backend.decode(ids, skip_special_tokens=False) == plain)

    if not same(found.text, ids):
        sample = backend.encode(found.skeleton, add_special_tokens=False).ids
        if same(found.skeleton, sample):
            raise DataError("the tokens don't give the text back: the tokenizer lacks some of it")
