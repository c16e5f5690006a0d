"""The names of roles in chat files, and what they mean."""

from __future__ import annotations

from ..chat import ROLES
from .record_keys import canonical

CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls", "functioncall"})
"""Roles of turns that are a tool call, written as JSON text."""

THOUGHT_ROLES = frozenset({"reasoning", "thinking", "thought"})
"""Roles of turns that are a thought, which belongs to the next answer."""

CHANNELS = frozenset({"analysis", "commentary", "final"})
"""What OpenAI's Harmony calls the parts of an answer: its thought, what is said between, and the answer itself."""

THOUGHT_CHANNEL = "analysis"

ROLE_NAMES = {
    **{role: role for role in ROLES}, "developer": "system", "human": "user", "prompter": "user",
    "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant", "ai": "assistant",
    "chatgpt": "assistant", "answer": "assistant", **dict.fromkeys(sorted(CALL_ROLES), "assistant"),
    "function": "tool", "observation": "tool",
    "tool_response": "tool", "tool_result": "tool", "tool_output": "tool", "function_response": "tool",
    "function_result": "tool", "ipython": "tool", "environment": "tool",
}  # fmt: skip
"""Every known name of a role, in canonical form, and the role that it means."""


def role_of(name: str) -> str | None:
    """Return the role that a name means, in any case; None if it is unknown."""
    return ROLE_NAMES.get(name) or ROLE_NAMES.get(canonical(name))
