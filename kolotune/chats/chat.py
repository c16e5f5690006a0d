"""A chat and its messages: the two classes that everything in `kolotune.chats` works on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from json.encoder import encode_basestring
from pathlib import Path

from kolotune.foundation.typed_storage import JsonObject

ROLES = ("system", "user", "assistant", "tool")
_CANONICAL = json.JSONEncoder(sort_keys=True, ensure_ascii=False)


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: One of `ROLES`.
        content: The text. Only a message with `tool_calls` may have none.
        reasoning: What the assistant thought before it answered, or None.
        tool_calls: The assistant's tool calls in the OpenAI format.
        name: The name of the tool (tool messages only), or None.
        tool_call_id: The call that a tool message answers, or None.
        weight: How much the loss on it counts, from 0 to 1; 0 excludes it. Only an assistant turn may have less than 1.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[JsonObject, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float = 1.0

    @property
    def is_trained(self) -> bool:
        """Whether the loss falls on it."""
        return self.weight > 0

    @property
    def is_plain(self) -> bool:
        """Whether templates get a role and a text of the message and nothing else."""
        return self.reasoning is None and not self.tool_calls and self.name is None and self.tool_call_id is None

    def as_dict(self) -> JsonObject:
        """Return the message as chat templates expect it, without keys that have no value."""
        out: JsonObject = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.name is not None:
            out["name"] = self.name
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        return out


@dataclass(frozen=True)
class Chat:
    """One conversation and where it was read. The location does not take part in comparisons.

    Attributes:
        messages: The turns in order; at least one is the assistant's.
        source: The file.
        line: The line in the file, starting at 1; in a Parquet file, the number of the record.
        tools: Definitions of the tools that the model is offered, in the OpenAI format.
        lost_tool_keys: The keys of their definitions that Ollama does not hand on, by name; see `served_form`.
        rejected: Of a pair, the turns of the chat that is not preferred; they begin with the same prompt.
        is_desirable: Whether the answer is good, where answers are rated.
    """

    messages: tuple[Message, ...]
    source: Path = field(default=Path("-"), compare=False)
    line: int = field(default=0, compare=False)
    tools: tuple[JsonObject, ...] = ()
    lost_tool_keys: tuple[str, ...] = field(default=(), compare=False)
    rejected: tuple[Message, ...] = ()
    is_desirable: bool = True

    @cached_property
    def is_plain(self) -> bool:
        """Whether the chat is roles and texts alone, and the loss on every answer counts in full."""
        return not self.tools and all([message.is_plain and message.weight == 1 for message in self.messages])

    def message_dicts(self) -> list[JsonObject]:
        """Return the messages as chat templates expect them."""
        return [message.as_dict() for message in self.messages]

    @property
    def rejected_chat(self) -> Chat:
        """Of a pair, the chat that is not preferred."""
        return replace(self, messages=self.rejected, rejected=())

    def content_hash(self) -> bytes:
        """Return the SHA-256 of the messages and tools, which identifies equal chats wherever they were read."""
        tools = _CANONICAL.encode(list(self.tools)) if self.tools else "[]"
        text = f"[{_canonical_messages(self.messages)}, {tools}]"
        if self.rejected:
            text += f" over {_canonical_messages(self.rejected)}"
        if not self.is_desirable:
            text += " undesirable"
        if lighter := [(number, message.weight) for number, message in enumerate(self.messages) if message.weight < 1]:
            text += f" {[number if not weight else (number, weight) for number, weight in lighter]}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _canonical_messages(messages: tuple[Message, ...]) -> str:
    """Return what ``json.dumps(messages, sort_keys=True)`` writes; most are plain and take the short path."""
    texts = [
        f'{{"content": {encode_basestring(message.content)}, "role": {encode_basestring(message.role)}}}'
        if message.is_plain
        else _CANONICAL.encode(message.as_dict())
        for message in messages
    ]
    return f"[{', '.join(texts)}]"


def called_function(call: JsonObject) -> JsonObject:
    """Return the part of a tool call that has its name and arguments. Some files leave out the object around it."""
    function = call.get("function", call)
    return function if isinstance(function, dict) else {}


def trained_answers(chat: Chat) -> list[int]:
    """Return the numbers of the messages that the loss falls on."""
    return [index for index, message in enumerate(chat.messages) if message.role == "assistant" and message.is_trained]
