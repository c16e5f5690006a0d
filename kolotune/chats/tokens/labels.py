"""Labels: which tokens of a rendered chat the loss falls on, given its answers as character spans."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..templates.loss_mask import LocatedChat, MaskedChat
from .backend import OffsetTokens, check_decodes, encode_text
from .encoded_chat import EncodedChat, packed
from .token_bytes import TokenBytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def label_by_bytes(chats: Sequence[tuple[MaskedChat, bytes]], token_bytes: TokenBytes) -> list[EncodedChat]:
    """Label many chats at once: a label starts and ends where the bytes of the tokens add up to.

    Args:
        chats: Each masked chat with its packed ids, whose tokens are the bytes of its text.
        token_bytes: The bytes of the tokens.
    """
    import numpy as np

    if not chats:
        return []
    ids = np.frombuffer(b"".join([packed_ids for _, packed_ids in chats]), np.int32)
    token_starts = np.concatenate(([0], np.cumsum(token_bytes.lengths(ids), dtype=np.int64)))
    bounds: list[int] = []  # of all answers, in bytes
    base = 0
    for chat, _ in chats:
        ends = [bound for span in chat.spans for bound in span]
        if chat.text.isascii():
            bounds += [base + end for end in ends]
            base += len(chat.text)
        else:
            bounds += [base + len(chat.text[:end].encode()) for end in ends]
            base += len(chat.text.encode())
    # The first token that starts at a bound or behind it.
    first_tokens = np.searchsorted(token_starts, bounds)
    is_inside = (token_starts[first_tokens] != bounds).tolist()
    tokens = first_tokens.tolist()
    encoded, first, number = [], 0, 0
    for chat, packed_ids in chats:
        labels, merged = bytearray(len(packed_ids) // 4), False
        for _ in chat.spans:
            start, end = tokens[number] - first, tokens[number + 1] - first
            labels[start:end] = b"\1" * (end - start)
            merged = merged or is_inside[number]
            number += 2
        first += len(labels)
        encoded.append(EncodedChat(packed_ids, bytes(labels), boundary_merge=merged))
    return encoded


def label_by_offsets(chat: LocatedChat, backend: Tokenizer) -> EncodedChat:
    """Label a chat by encoding prompts and answers separately, or else by the offsets of its tokens.

    Raises:
        DataError: The text contains half a character, or the tokens don't decode to it.
    """
    tokens = encode_text(backend, chat.text)
    labels = _labels_of_parts(backend, chat, tokens.ids)
    check_decodes(chat, tokens.ids, backend)
    if labels is None:
        return labelled_tokens(chat, tokens)
    return EncodedChat(packed(tokens.ids), bytes(labels))


def labelled_tokens(chat: LocatedChat, tokens: OffsetTokens, special_in_content: bool = False) -> EncodedChat:
    """Label tokens by their offsets: those that start inside an answer."""
    labels = [any(start <= begin < end for start, end in chat.spans) for begin in tokens.starts]
    offsets = list(zip(tokens.starts, tokens.ends, strict=True))
    merged = any(begin < start < end for begin, end in offsets for start, _ in chat.spans)
    return EncodedChat(packed(tokens.ids), bytes(labels), special_in_content, merged)


def _labels_of_parts(backend: Tokenizer, chat: LocatedChat, ids: list[int]) -> list[bool] | None:
    """Encode prompts and answers separately; None if that gives different ids than the whole."""
    bounds = [0, *(bound for span in chat.spans for bound in span), len(chat.text)]
    labels: list[bool] = []
    joined: list[int] = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        part = backend.encode(chat.text[start:end], add_special_tokens=False).ids if end > start else []
        joined += part
        labels += [number % 2 == 1] * len(part)
    return labels if joined == ids else None
