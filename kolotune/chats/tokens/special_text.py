"""Special tokens whose text occurs in a content: encoded as plain text, so that they mean nothing to the model.

Example: in a chat about ChatML, a user's ``<|im_end|>`` becomes the tokens of these ten characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from kolotune.foundation.errors import DataError

from ..chat import Chat
from ..templates.rendering import Span
from ..templates.reply_format import token_pattern
from .backend import OffsetTokens, SpecialToken

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def contains_special_text(chat: Chat, pattern: re.Pattern[str]) -> bool:
    """Whether a text of the chat contains the text of a special token.

    Raises:
        DataError: One is in a tool call or a tool definition, so it can't be distinguished from the template's own.
    """
    for message in chat.messages:
        if not (message.tool_calls or message.name or message.tool_call_id):
            continue
        shell = json.dumps([message.tool_calls, message.name, message.tool_call_id], ensure_ascii=False)
        if match := pattern.search(shell):
            raise DataError(f"a tool call contains the text of the special token {match[0]}")
    if chat.tools and (match := pattern.search(json.dumps(chat.tools, ensure_ascii=False))):
        raise DataError(f"a tool definition contains the text of the special token {match[0]}")
    texts = (text for message in chat.messages for text in (message.content, message.reasoning or ""))
    return any(pattern.search(text) for text in texts)


def encode_as_plain_text(
    text: str,
    slots: Sequence[Span] | None,
    skeleton: str,
    backend: Tokenizer,
    special: Mapping[str, SpecialToken],
) -> OffsetTokens:
    """Encode the special tokens that the template wrote as such, and all other text as plain text.

    Args:
        text: A rendering, or a part of one.
        slots: The spans of the chat's own texts in it; None if they are not known.
        skeleton: A rendering with marks instead of texts.
        backend: The tokenizer; must be bare.
        special: Its special tokens by their text.

    Raises:
        DataError: It is unclear which tokens the template wrote, or this tokenizer can't do it exactly.
    """
    reason, pattern = "a message contains the text of a special token", token_pattern(frozenset(special))
    if slots is None:
        raise DataError(f"{reason}, which can't be distinguished from those that the chat template writes")
    # This must be exactly what the tokenizer itself does. Checked with the skeleton, in which all special tokens are
    # the template's.
    sample = _encode_fragments(backend, skeleton, (), special)
    if sample.ids != backend.encode(skeleton, add_special_tokens=False).ids:
        raise DataError(f"{reason}, which this model's tokenizer can't write as plain text exactly")
    tokens = _encode_fragments(backend, text, slots, special)
    # Only those that the chat mentions: the unknown token may well occur in it for another reason.
    texts = [text[start:end] for start, end in slots]
    mentioned = {token: special[token].id for token in special if any(token in text for text in texts)}
    pieces = [text[start:end] for start, end in _between(slots, len(text))]
    written = sum(match[0] in mentioned for piece in pieces for match in pattern.finditer(piece))
    if sum(index in mentioned.values() for index in tokens.ids) != written:
        raise DataError(f"{reason}, which this model's tokenizer can't write as plain text")
    return tokens


def _between(slots: Sequence[Span], length: int) -> list[Span]:
    """Return the spans before, between and behind the slots."""
    bounds = [0, *(bound for slot in slots for bound in slot), length]
    return list(pairwise(bounds))[::2]


def _encode_fragments(
    backend: Tokenizer, text: str, slots: Sequence[Span], special: Mapping[str, SpecialToken]
) -> OffsetTokens:
    """Encode the special tokens outside the slots as such, and the text between them as plain text."""
    tokens = OffsetTokens()
    done = 0

    def encode_plain(until: int) -> None:
        if until > done:
            encoding = backend.encode(text[done:until], add_special_tokens=False)
            tokens.add(encoding.ids, encoding.offsets, done)

    backend.encode_special_tokens = True
    try:
        for start, end in _between(slots, len(text)):
            for match in token_pattern(frozenset(special)).finditer(text, start, end):
                token = special[match[0]]
                before, behind = text[done : match.start()], text[match.end() :]
                begin = done + len(before.rstrip()) if token.lstrip else match.start()
                encode_plain(begin)
                done = match.end() + (len(behind) - len(behind.lstrip()) if token.rstrip else 0)
                tokens.add([token.id], [(begin, done)], 0)
        encode_plain(len(text))
    finally:
        backend.encode_special_tokens = False
    return tokens
