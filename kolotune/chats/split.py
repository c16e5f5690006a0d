"""Which chats are held out: decided by their content, so that adding chats moves no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from . import Chat

# From so many chats on, at least one is held out.
_ENOUGH_TO_HOLD_OUT = 20


def content_hash(chat: Chat) -> str:
    """SHA-256 of messages and tools, in hex; where the chat was read from plays no part."""
    content = json.dumps([chat.message_dicts(), list(chat.tools)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def split(chats: Sequence[Chat], share: float) -> tuple[list[Chat], list[Chat]]:
    """Training and held-out chats, each in the order given.

    A chat is held out when its hash, as a fraction, is below `share`; when that leaves none and there are at
    least 20 chats, the one with the lowest hash is.
    """
    hashes = [int(content_hash(chat), 16) for chat in chats]
    held_out = {index for index, value in enumerate(hashes) if value < share * 2**256}
    if not held_out and share > 0 and len(chats) >= _ENOUGH_TO_HOLD_OUT:
        held_out = {min(range(len(chats)), key=hashes.__getitem__)}
    if len(held_out) == len(chats):
        held_out = set()
    train = [chat for index, chat in enumerate(chats) if index not in held_out]
    return train, [chats[index] for index in sorted(held_out)]
