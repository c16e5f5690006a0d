"""Rendered chats as token ids with labels.

Tokens come from the whole text, as a server tokenizes it. Where the tokenizer works on bytes, the ids are proven to be
the text, and each label found, by adding up the bytes of the tokens; other tokenizers are asked where each token
stands, or for prompts and answers apart.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import DataError, TemplateError

from ..chat import Chat
from ..templates.loss_mask import Located, locate, pattern_of
from ..templates.rendering import Span
from ..templates.signatures import Forms, Placed
from ..templates.template import ChatTemplate
from .token_bytes import TokenBytes
from .word_cache import packed, words_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class EncodedChat:
    """A chat as tokens.

    Attributes:
        packed_ids: the token ids of the whole rendering, as int32 in memory.
        packed_labels: for each of them a byte that says whether the loss falls on it.
        turn_starts: the index into `ids` where each exchange starts: a user's turn and all up to the next
            user's turn that follows an answer. The first is 0. Cutting there leaves whole exchanges.
        special_in_content: a content holds the text of a special token; it was encoded as plain text.
        boundary_merge: a token holds both the end of a prompt and the start of an answer. It is not
            labelled, and the served prompt will end with another token than the one trained on.
    """

    packed_ids: bytes
    packed_labels: bytes
    turn_starts: list[int]
    special_in_content: bool
    boundary_merge: bool

    def __len__(self) -> int:
        return len(self.packed_labels)

    @property
    def ids(self) -> list[int]:
        """The token ids."""
        return array("i", self.packed_ids).tolist()

    @property
    def labelled(self) -> list[bool]:
        """For each id, whether the loss falls on it."""
        return [bool(each) for each in self.packed_labels]


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
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.template, self._backend, self._special)

    def _begin(self) -> None:
        self._names = frozenset(self._special)
        self._bytes = TokenBytes(self._backend)
        with _bare(self._backend):
            words = words_of(self._backend)
        # Where a named special token is none to the tokenizer itself, its text is more than this token.
        self._words = words if words is not None and self._names <= words.added else None
        self._forms = Forms(self.template, self._names, words.added if words is not None else frozenset())

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
        out: dict[int, EncodedChat | TemplateError | DataError] = {}
        found: dict[int, Located | Placed] = {}
        ids: dict[int, bytes] = {}
        with _bare(self._backend):
            for index, chat in enumerate(chats):
                try:
                    if (placed := self._forms.place(chat)) is not None:
                        found[index] = placed
                        if self._words is not None and (known := self._words.ids(placed.parts)) is not None:
                            ids[index] = known
                        continue
                    located = locate(chat, self.template, self._names)
                    if _special_in_content(chat, pattern_of(self._names)):
                        out[index] = self._with_special(located)
                    else:
                        found[index] = located
                except (TemplateError, DataError) as error:
                    out[index] = error
            ids |= self._asked({index: each.text for index, each in found.items() if index not in ids})
            proven = [(each, ids[index]) for index, each in found.items() if index in ids]
            out |= dict(zip([index for index in found if index in ids], labelled(proven, self._bytes), strict=True))
            for index in found.keys() - ids.keys():
                try:
                    out[index] = self._by_places(locate(chats[index], self.template, self._names))
                except (TemplateError, DataError) as error:
                    out[index] = error
        return [out[index] for index in range(len(chats))]

    def _asked(self, texts: Mapping[int, str]) -> dict[int, bytes]:
        """What the tokenizer makes of the texts, where that is proven to be the text by the bytes of the tokens."""
        try:
            encoded = self._backend.encode_batch_fast(list(texts.values()), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            return {}  # one of them holds half a character: `_by_places` tells which
        proven = {}
        for (index, text), each in zip(texts.items(), encoded, strict=True):
            ids = each.ids
            parts = self._bytes.of(ids)
            if parts is not None and b"".join(parts) == text.encode() and not self._bytes.changes(text):
                proven[index] = packed(ids)
        return proven

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


def _restored(template: ChatTemplate, backend: Any, special: dict[str, Any]) -> Encoder:
    encoder = Encoder.__new__(Encoder)
    encoder.template, encoder._backend, encoder._special = template, backend, special
    encoder._begin()
    return encoder


def labelled(chats: Sequence[tuple[Located | Placed, bytes]], token_bytes: TokenBytes) -> list[EncodedChat]:
    """Chats with labels, all at once: a label begins and ends where the bytes of the tokens before it add up to.

    Args:
        chats: each chat's places, and its ids as int32 in memory; its tokens are the bytes of its text.
        token_bytes: the bytes of the tokens.
    """
    import numpy as np

    if not chats:
        return []
    ids = np.frombuffer(b"".join([each for _, each in chats]), np.int32)
    begins = np.concatenate(([0], np.cumsum(token_bytes.lengths(ids), dtype=np.int64)))
    places: list[int] = []
    base = 0
    for found, _ in chats:
        wanted = [*(bound for span in found.spans for bound in span), *found.turn_starts]
        if found.text.isascii():
            places += [base + at for at in wanted]
            base += len(found.text)
        else:
            places += [base + len(found.text[:at].encode()) for at in wanted]
            base += len(found.text.encode())
    # The first token that begins at the place or behind it.
    at = np.searchsorted(begins, places)
    inside = (begins[at] != places).tolist()
    tokens = at.tolist()
    out, first, place = [], 0, 0
    for found, packed_ids in chats:
        labels, merged = bytearray(len(packed_ids) // 4), False
        for _ in found.spans:
            start, end = tokens[place] - first, tokens[place + 1] - first
            labels[start:end] = b"\1" * (end - start)
            merged = merged or inside[place]
            place += 2
        starts = [token - first for token in tokens[place : place + len(found.turn_starts)]]
        place += len(starts)
        first += len(labels)
        out.append(EncodedChat(packed_ids, bytes(labels), starts, False, merged))
    return out


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
    return EncodedChat(packed(tokens.ids), bytes(labels), starts, inside, merged)


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
