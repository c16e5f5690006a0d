"""Labels: which tokens of a chat in one piece the loss falls on, given its answers as character spans.

A chat gets none if the tokens before an answer are not those of its prompt; then its answers are encoded apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ..templates.loss_mask import LocatedChat, MaskedChat
from .backend import OffsetTokens, check_decodes, encode_text
from .encoded_chat import EncodedChat, packed, packed_weights
from .prompt_ends import PromptEnds
from .token_bytes import TokenBytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Labeller:
    """Labels chats in one piece.

    Attributes:
        prompt_ends: The tokens of the ends of prompts.
        learns_empty_thoughts: Whether the loss falls on empty thoughts, too.
    """

    prompt_ends: PromptEnds
    learns_empty_thoughts: bool

    def by_bytes(self, chats: Sequence[tuple[MaskedChat, bytes]], token_bytes: TokenBytes) -> list[EncodedChat | None]:
        """Label many chats at once: a label starts and ends where the bytes of the tokens add up.

        Args:
            chats: Each masked chat with its packed ids, whose tokens are the bytes of its text.
            token_bytes: The bytes of the tokens.

        Returns:
            None for chats whose answers have to be encoded apart.
        """
        import numpy as np

        if not chats:
            return []
        ids = np.frombuffer(b"".join([packed_ids for _, packed_ids in chats]), np.int32)
        token_starts = np.concatenate(([0], np.cumsum(token_bytes.lengths(ids), dtype=np.int64)))
        bounds = _byte_bounds([chat for chat, _ in chats])
        # The first token that starts at a bound or behind it.
        first_tokens = np.searchsorted(token_starts, bounds)
        is_inside = (token_starts[first_tokens] != bounds).tolist()
        tokens = first_tokens.tolist()
        encoded: list[EncodedChat | None] = []
        first, number = 0, 0
        for chat, packed_ids in chats:
            labels, is_apart = bytearray(len(packed_ids) // 4), False
            lighter = []
            ends = self.prompt_ends.of_chat(chat)
            for end_ids, thought, weight in zip(ends, chat.empty_thoughts, chat.weights, strict=True):
                start, stop = tokens[number] - first, tokens[number + 1] - first
                if is_inside[number] or packed_ids[4 * start - len(end_ids) : 4 * start] != end_ids:
                    is_apart = True
                if thought and not self.learns_empty_thoughts:
                    reach = token_starts[tokens[number]] + thought
                    start = int(np.searchsorted(token_starts, reach, "right")) - 1 - first
                if weight:
                    labels[start:stop] = b"\1" * (stop - start)
                if 0 < weight < 1:
                    lighter.append((start, stop, weight))
                number += 2
            first += len(labels)
            encoded.append(None if is_apart else self._encoded(chat, packed_ids, labels, lighter))
        return encoded

    def by_offsets(self, chat: LocatedChat, backend: Tokenizer) -> EncodedChat | None:
        """Label a chat by encoding prompts and answers separately, or else by the offsets of its tokens.

        Raises:
            DataError: The text contains half a character, or the tokens don't decode to it.
        """
        tokens = encode_text(backend, chat.text)
        check_decodes(chat.text, chat.skeleton, tokens.ids, backend)
        starts = _starts_of_parts(backend, chat, tokens.ids)
        return self.by_known_offsets(chat, tokens, starts)

    def by_known_offsets(
        self, chat: LocatedChat, tokens: OffsetTokens, bounds: Sequence[tuple[int, int]] | None = None
    ) -> EncodedChat | None:
        """Label tokens by their offsets: those that start inside an answer.

        Args:
            chat: The chat.
            tokens: Its tokens.
            bounds: The first token of each answer and the first behind it, if they are known.

        Returns:
            None if the answers have to be encoded apart.
        """
        if bounds is None:
            offsets = list(zip(tokens.starts, tokens.ends, strict=True))
            if any(begin < start < end for begin, end in offsets for start, _ in chat.spans):
                return None
            bounds = [(_tokens_before(tokens, start), _tokens_before(tokens, end)) for start, end in chat.spans]
        packed_ids = packed(tokens.ids)
        labels = bytearray(len(tokens.ids))
        ends = self.prompt_ends.of_chat(chat)
        lighter = []
        for (start, stop), (begin, _), end_ids, thought, weight in zip(
            bounds, chat.spans, ends, chat.empty_thoughts, chat.weights, strict=True
        ):
            if packed_ids[4 * start - len(end_ids) : 4 * start] != end_ids:
                return None
            first = start
            if thought and not self.learns_empty_thoughts:
                first += sum(end <= begin + thought for end in tokens.ends[start:stop])
            if weight:
                labels[first:stop] = b"\1" * (stop - first)
            if 0 < weight < 1:
                lighter.append((first, stop, weight))
        return self._encoded(chat, packed_ids, labels, lighter)

    def _encoded(
        self, chat: MaskedChat, packed_ids: bytes, labels: bytearray, lighter: Sequence[tuple[int, int, float]]
    ) -> EncodedChat:
        masked = 0
        if not self.learns_empty_thoughts and any(chat.empty_thoughts):
            thoughts = zip(chat.empty_thoughts, chat.weights, strict=True)
            masked = sum([length > 0 and weight > 0 for length, weight in thoughts])
        weights = packed_weights(labels, lighter)
        return EncodedChat(packed_ids, bytes(labels), masked_thoughts=masked, packed_weights=weights)


def _tokens_before(tokens: OffsetTokens, bound: int) -> int:
    return sum(begin < bound for begin in tokens.starts)


def _byte_bounds(chats: Sequence[MaskedChat]) -> list[int]:
    """Return the start and end of each answer, in bytes of all texts end to end."""
    bounds: list[int] = []
    base = 0
    for chat in chats:
        ends = [bound for span in chat.spans for bound in span]
        if chat.text.isascii():
            bounds += [base + end for end in ends]
            base += len(chat.text)
        else:
            bounds += [base + len(chat.text[:end].encode()) for end in ends]
            base += len(chat.text.encode())
    return bounds


def _starts_of_parts(backend: Tokenizer, chat: LocatedChat, ids: list[int]) -> list[tuple[int, int]] | None:
    """Encode prompts and answers separately; None if that gives different ids than the whole."""
    bounds = [0, *(bound for span in chat.spans for bound in span), len(chat.text)]
    firsts: list[int] = []
    joined: list[int] = []
    for start, end in pairwise(bounds):
        joined += backend.encode(chat.text[start:end], add_special_tokens=False).ids if end > start else []
        firsts.append(len(joined))
    return list(zip(firsts[::2], firsts[1::2], strict=False)) if joined == ids else None
