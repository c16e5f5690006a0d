"""Chats as the tables of docs/chat-files.md write them, and the rows of these tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from kolotune.chats import Chat, Message
from kolotune.chats.chat import called_function

DOC = Path(__file__).parents[2] / "docs" / "chat-files.md"
LETTERS = {"system": "S", "user": "U", "assistant": "A", "tool": "T"}


def rows(*heads: str) -> Iterator[list[str]]:
    """Yield the cells of the rows of each table whose head has these columns."""
    is_wanted = False
    for line in DOC.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.replace("\\|", "\0").strip("|").split("|")]
        if not line.startswith("|"):
            is_wanted = False
        elif cells == list(heads):
            is_wanted = True
        elif is_wanted and not line.startswith("|---"):
            yield [cell.replace("\0", "|") for cell in cells]


def shown(chat: Chat | None) -> str:
    """Return a chat as the tables write it."""
    assert chat is not None
    offered = [f"{called_function(tool)['name']} offered" for tool in chat.tools]
    return " · ".join([*offered, turns_shown(chat.messages)])


def turns_shown(messages: Sequence[Message]) -> str:
    return " · ".join(map(turn_shown, messages))


def turn_shown(message: Message) -> str:
    thought = f"({message.reasoning})" if message.reasoning else ""
    functions = map(called_function, message.tool_calls)
    calls = [f"{each['name']}{json.dumps(each['arguments'])}" for each in functions]
    content = message.content.replace("\n", "\\n")
    return " ".join([f"{LETTERS[message.role]}{thought}", *([content] if content else []), *calls])
