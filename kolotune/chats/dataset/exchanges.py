"""Chats whose template leaves out earlier thoughts, taken apart: one chat of each exchange."""

from __future__ import annotations

import dataclasses

from ..chat import Chat, trained_answers


def exchanges_of(chat: Chat) -> list[Chat]:
    """Return one chat of each exchange: it ends with the exchange, and only the answers in that are trained on.

    An exchange starts with a user's turn behind an answer. Those without an answer that is trained on are left out.
    """
    messages = chat.messages
    starts = [
        at for at in range(1, len(messages)) if messages[at].role == "user" and messages[at - 1].role == "assistant"
    ]
    exchanges = []
    for start, end in zip([0, *starts], [*starts, len(messages)], strict=True):
        before = [
            dataclasses.replace(turn, weight=0.0) if turn.role == "assistant" else turn for turn in messages[:start]
        ]
        exchange = dataclasses.replace(chat, messages=(*before, *messages[start:end]))
        if trained_answers(exchange):
            exchanges.append(exchange)
    return exchanges
