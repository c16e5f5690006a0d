"""What Ollama and llama.cpp's server make of a conversation before the GGUF's template gets it.

`render` does the same with our own renderer of Jinja templates. Where llama.cpp's server itself can be asked, ask that
(`kolotune.llamacpp.prompt_server`): this shows that our renderer agrees with it, and needs no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kolotune.chats.served_form import tool_as_served
from kolotune.chats.templates import sandbox
from kolotune.foundation.errors import TemplateError

Turns = Sequence[Mapping[str, Any]]


def from_ollama(messages: Turns) -> list[dict[str, Any]]:
    """Return the messages that Ollama sends to llama.cpp's server: thoughts are left out (llm/llama_server.go)."""
    sent = []
    for message in messages:
        turn = {"role": message["role"], "content": message.get("content") or ""}
        if message.get("tool_call_id"):
            turn["tool_call_id"] = message["tool_call_id"]
        if message.get("tool_name"):
            turn["name"] = message["tool_name"]
        if message.get("tool_calls"):
            turn["tool_calls"] = [{"type": "function", **call} for call in message["tool_calls"]]
        sent.append(turn)
    return sent


def render(jinja: str, messages: Turns, tools: Turns, think: bool | None, today: str) -> str:
    """Return the prompt.

    Args:
        jinja: the GGUF's template.
        messages: as a client sends them to Ollama.
        tools: the definitions.
        think: as Ollama sends it: None where the model can't think.
        today: what the server gives to templates as the date.

    Raises:
        TemplateError: the template refuses the messages.
    """
    turns = [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in from_ollama(messages)]
    if turns[0]["role"] == "system" and len(turns) > 1 and _refuses_system(jinja):
        system, first, *rest = turns
        turns = [{**first, "content": f"{system['content']}\n{first['content']}"}, *rest]
    continued = turns.pop()["content"] if turns[-1]["role"] == "assistant" else ""
    variables = {"date_string": today, "enable_thinking": think is not False, "add_generation_prompt": True}
    return sandbox.render(jinja, turns, [tool_as_served(tool) for tool in tools], variables) + continued


def _refuses_system(jinja: str) -> bool:
    probe = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    try:
        return "S" not in sandbox.render(jinja, probe, None, {"add_generation_prompt": True})
    except TemplateError:
        return True
