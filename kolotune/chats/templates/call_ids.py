"""Ids of tool calls, where a template asks for some: ids carry no meaning, so others are put in.

Mistral's templates refuse ids that are not nine letters or digits, and chats without ids. Most data sets have ids as
OpenAI's API makes them (``call_…``), or none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from enum import Enum

from kolotune.foundation.errors import TemplateError
from kolotune.foundation.typed_storage import JsonObject

from ..chat import Chat, Message, called_function
from .template import ChatTemplate

_SHORT = re.compile("[a-zA-Z0-9]{9}")
_LONG_ID, _SHORT_ID = "call_" + "a1" * 12, "a1b2c3d4e"


class CallIds(Enum):
    """The ids of calls that a template takes."""

    ANY = "any, or none"
    GIVEN = "any"
    SHORT = "nine letters or digits"

    def accepts(self, call_id: object) -> bool:
        """Whether the template takes an id; None stands for a call without one."""
        if self is CallIds.ANY:
            return True
        return isinstance(call_id, str) and (self is CallIds.GIVEN or _SHORT.fullmatch(call_id) is not None)


def call_ids_of(template: ChatTemplate) -> CallIds:
    """Find out which ids of calls a template takes, by rendering a short chat with a call."""
    if _renders(template, None) or not _renders(template, _SHORT_ID):
        return CallIds.ANY
    return CallIds.GIVEN if _renders(template, _LONG_ID) else CallIds.SHORT


def with_accepted_ids(chat: Chat, ids: CallIds) -> Chat:
    """Return a chat whose calls and results have ids that the template takes; the same object if they do."""
    calls = [call for message in chat.messages for call in message.tool_calls]
    results = [message for message in chat.messages if message.role == "tool"]
    given = [*(call.get("id") for call in calls), *(message.tool_call_id for message in results)]
    if all(map(ids.accepts, given)):
        return chat
    count = 0
    pending: list[tuple[object, str, str]] = []
    messages: list[Message] = []
    for message in chat.messages:
        if message.tool_calls:
            pending, renamed = [], []
            for call in message.tool_calls:
                count += 1
                short = f"call{count:05d}"
                pending.append((call.get("id"), str(called_function(call).get("name")), short))
                renamed.append({**call, "id": short})
            message = dataclasses.replace(message, tool_calls=tuple(renamed))
        elif message.role == "tool":
            at = _call_of(message, pending)
            if at is not None:
                message = dataclasses.replace(message, tool_call_id=pending.pop(at)[2])
        messages.append(message)
    return dataclasses.replace(chat, messages=tuple(messages))


def _call_of(result: Message, pending: Sequence[tuple[object, str, str]]) -> int | None:
    """Return which of the calls without a result this is the result of: by id, else by name, else the first."""
    for at, (call_id, _, _) in enumerate(pending):
        if result.tool_call_id is not None and call_id == result.tool_call_id:
            return at
    for at, (_, name, _) in enumerate(pending):
        if result.name is not None and name == result.name:
            return at
    return 0 if pending else None


def _renders(template: ChatTemplate, call_id: str | None) -> bool:
    given: JsonObject = {} if call_id is None else {"id": call_id}
    result: JsonObject = {} if call_id is None else {"tool_call_id": call_id}
    function: JsonObject = {"name": "a", "arguments": {}}
    tool: JsonObject = {
        "type": "function",
        "function": {"name": "a", "description": "a", "parameters": {"type": "object", "properties": {}}},
    }
    messages: list[JsonObject] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", **given, "function": function}]},
        {"role": "tool", "name": "a", "content": "a", **result},
        {"role": "assistant", "content": "a"},
    ]
    try:
        template.render(messages, [tool])
    except TemplateError:
        return False
    return True
