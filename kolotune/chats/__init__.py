"""Chats: what they are (here), how files are read (`formats`), what is checked (`checks`), how they become
tokens with a loss mask (`template`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn of a chat.

    Attributes:
        role: one of `ROLES`.
        content: the text; empty only where `tool_calls` stand in its place.
        reasoning: the thinking that came before the answer (assistant only), or None.
        tool_calls: calls of tools in the OpenAI shape (assistant only).
        name: the tool's name (tool only), or None.
        tool_call_id: the call that a tool turn answers, or None.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a role and a text and no more."""
        return self.reasoning is None and not self.tool_calls and self.name is None and self.tool_call_id is None

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates expect it; keys without a value are left out."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
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
    """One conversation and where it came from.

    Attributes:
        messages: the turns in order, at least one of them from the assistant.
        source: the file it was read from.
        line: its line in that file, counted from 1 (for JSON arrays, CSV and Parquet: its row).
        tools: tool definitions in the OpenAI shape, offered to the model in this chat.
    """

    messages: tuple[Message, ...]
    source: Path = field(default=Path("-"), compare=False)
    line: int = field(default=0, compare=False)
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def where(self) -> str:
        """``file:line``, as it is shown to the user."""
        return f"{self.source}:{self.line}"

    def message_dicts(self) -> list[dict[str, Any]]:
        """The messages as chat templates expect them."""
        return [message.as_dict() for message in self.messages]
