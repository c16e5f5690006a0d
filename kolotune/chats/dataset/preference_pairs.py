"""Encode chats of preferences: of a pair, the sequences of the rejected chat and then those of the preferred one.

Both begin with the same prompt, so that the training computes what they share once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

from ..chat import Chat
from ..tokens.encoded_chat import EncodedChat
from ..tokens.encoder import Encoder
from ..tokens.strategies import Encoding


def encode_preferences(encoder: Encoder, chats: Sequence[Chat]) -> list[Encoding]:
    """Encode chats, of which some may be pairs or rated; see `Encoder.encode_all`."""
    pairs = [chat for chat in chats if chat.rejected]
    encodings = encoder.encode_all([*chats, *(chat.rejected_chat for chat in pairs)])
    rejected = iter(encodings[len(chats) :])
    return [
        _joined(next(rejected), encoding) if chat.rejected else _rated(chat, encoding)
        for chat, encoding in zip(chats, encodings[: len(chats)], strict=True)
    ]


def is_undecided(chat: Chat, encoding: Encoding) -> bool:
    """Whether both answers of a pair are the same, or become so in the template, which may trim them."""
    if not chat.rejected:
        return False
    if chat.rejected == chat.messages or not isinstance(encoding, EncodedChat):
        return chat.rejected == chat.messages
    tokens = sum(encoding.lengths[: encoding.rejected])
    first, rest = encoding.packed_labels[:tokens], encoding.packed_labels[tokens:]
    return first == rest and encoding.ids[:tokens] == encoding.ids[tokens:]


def _rated(chat: Chat, encoding: Encoding) -> Encoding:
    if chat.is_desirable or not isinstance(encoding, EncodedChat):
        return encoding
    return dataclasses.replace(encoding, rejected=len(encoding.lengths))


def _joined(rejected: Encoding, preferred: Encoding) -> Encoding:
    """Return both sides of a pair as one chat with several sequences, or why one can't be encoded."""
    if not isinstance(preferred, EncodedChat):
        return preferred
    if not isinstance(rejected, EncodedChat):
        return rejected
    return EncodedChat(
        rejected.packed_ids + preferred.packed_ids,
        rejected.packed_labels + preferred.packed_labels,
        rejected.special_in_content or preferred.special_in_content,
        tuple(accumulate([*rejected.lengths, *preferred.lengths])),
        preferred.apart or rejected.apart,
        rejected.masked_thoughts + preferred.masked_thoughts,
        rejected.dropped_thoughts + preferred.dropped_thoughts,
        rejected=len(rejected.lengths),
    )
