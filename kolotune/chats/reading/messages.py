"""From the turns of a record, whatever their names, to `Message`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..chat import ROLES, Message
from .faults import Fault, RecordError, printable, quoted
from .strict_json import parse_text

ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""Every name of a role that is read, and the role it means."""

# Training on a turn that its author excluded would be worse than not reading the chat.
_EXCLUSIONS = {"weight": 1, "train": True, "training": True}


def read_turns(raw: Any, first: int = 1) -> tuple[list[Message], list[Fault]]:
    """Reads a list of turns with OpenAI's keys (role, content) or ShareGPT's (from, value).

    Args:
        raw: what stands where the turns should be.
        first: the number of the first turn in messages to the user.

    Returns:
        The messages, and every fault; the messages are whole only when there is no fault.
    """
    if not isinstance(raw, list):
        return [], [Fault("no-messages", f"the turns are {kind_of(raw)}; they must be a list of objects")]
    if not raw:
        return [], [Fault("no-messages", "the list of turns is empty")]
    messages: list[Message] = []
    faults: list[Fault] = []
    for number, turn in enumerate(raw, first):
        if (plain := _plain_turn(turn)) is not None:
            messages.append(plain)
            continue
        try:
            messages.append(_read_turn(turn))
        except RecordError as error:
            faults.append(Fault(error.fault.kind, f"turn {number}: {error.fault.message}"))
    return messages, faults


def kind_of(value: Any) -> str:
    """The JSON name of a value's type, with its article, for messages."""
    names = ((str, "a text"), (bool, "true or false"), (int, "a number"), (float, "a number"))
    if value is None:
        return "null"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


def json_or_value(value: Any) -> Any:
    """Tables, and some JSON Lines files, hold lists as JSON in a text; this gives the list itself.

    Raises:
        RecordError: the text is no JSON.
    """
    if isinstance(value, str) and value.strip():
        return parse_text(value)
    return value


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Reads a record's tool definitions.

    Args:
        value: a list of objects, the same as JSON text, or nothing.

    Returns:
        The definitions.

    Raises:
        RecordError: they are something else.
    """
    try:
        tools = json_or_value(value)
    except RecordError as error:
        raise RecordError("bad-tools", f"tools: {error.fault.message}") from None
    if tools is None or tools == "" or tools == []:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError("bad-tools", "tools must be a list of objects")
    return tuple(tools)


def _plain_turn(turn: Any) -> Message | None:
    """The message of a turn that is a role and a text and nothing else, as most are; `_read_turn` makes the same."""
    if type(turn) is dict and len(turn) == 2 and "role" in turn and "content" in turn:
        role, content = turn["role"], turn["content"]
        if type(content) is str and type(role) is str and role in ROLES:
            return Message(role, content)
    return None


def _read_turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise RecordError("bad-message", f"{kind_of(turn)}; it must be an object with role and content")
    name = _role_name(turn)
    role = ROLE_NAMES[name]
    _refuse_exclusion(turn)
    raw_content = _first_of(turn, "content", "value")
    calls = _tool_calls(turn, role)
    if name == "function_call":
        calls, raw_content = (_spoken_call(raw_content),), None
    return Message(
        role=role,
        content=_content(raw_content, role, bool(calls)),
        reasoning=_reasoning(turn, role),
        tool_calls=calls,
        name=_text_or_none(turn, "name") if role == "tool" else None,
        tool_call_id=_text_or_none(turn, "tool_call_id") if role == "tool" else None,
    )


def _first_of(turn: Mapping[str, Any], *keys: str) -> Any:
    # Parquet gives every turn every key of the column, most of them null: null means absent.
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _role_name(turn: Mapping[str, Any]) -> str:
    name = _first_of(turn, "role", "from")
    if name is None:
        raise RecordError("missing-role", f"no role; known: {', '.join(ROLES)}")
    if not isinstance(name, str):
        raise RecordError("unknown-role", f"the role is {kind_of(name)}; known: {', '.join(ROLES)}")
    if name not in ROLE_NAMES:
        raise RecordError("unknown-role", f"unknown role {quoted(name, 30)}; known: {', '.join(ROLE_NAMES)}")
    return name


def _refuse_exclusion(turn: Mapping[str, Any]) -> None:
    for key, neutral in _EXCLUSIONS.items():
        value = turn.get(key)
        if value is not None and value != neutral:
            shown = printable(str(value).lower(), 20)
            cause = f"{key}: {shown} (don't train on this turn) is not supported; remove the turn or the key"
            raise RecordError("not-supported", cause)


def _content(raw: Any, role: str, has_calls: bool) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list):
        return "".join(_part(part) for part in raw)
    if raw is None and role == "assistant" and has_calls:
        return ""
    if raw is None:
        raise RecordError("missing-content", f"the {role}'s content is missing or null")
    raise RecordError("bad-content", f"the {role}'s content is {kind_of(raw)}; it must be a text")


def _part(part: Any) -> str:
    if not isinstance(part, dict):
        raise RecordError("unsupported-content", f"a content part is {kind_of(part)}; it must be an object")
    kind, text = part.get("type"), part.get("text")
    if kind == "text" and isinstance(text, str):
        return text
    shown = quoted(kind, 30) if isinstance(kind, str) else kind_of(kind)
    raise RecordError("unsupported-content", f"unsupported content of type {shown}; only text can be trained on")


def _reasoning(turn: Mapping[str, Any], role: str) -> str | None:
    reasoning = _first_of(turn, "reasoning_content", "reasoning")
    if reasoning is None or reasoning == "":
        return None
    if not isinstance(reasoning, str):
        raise RecordError("bad-reasoning", f"the reasoning is {kind_of(reasoning)}; it must be a text")
    if role != "assistant":
        raise RecordError("bad-reasoning", f"a {role} turn has reasoning; only an assistant turn may")
    return reasoning


def _text_or_none(turn: Mapping[str, Any], key: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise RecordError("bad-tool-turn", f"{key} is {kind_of(value)}; it must be a text")
    return value


def _tool_calls(turn: Mapping[str, Any], role: str) -> tuple[dict[str, Any], ...]:
    calls = turn.get("tool_calls")
    legacy = turn.get("function_call")
    if legacy is not None and not calls:
        # What OpenAI wrote before tool_calls; ignoring it would leave an answer without its call.
        calls = [{"function": legacy}]
    if calls is None or calls == []:
        return ()
    if role != "assistant":
        raise RecordError("bad-tool-call", f"a {role} turn has tool_calls; only an assistant turn may")
    if not isinstance(calls, list):
        raise RecordError("bad-tool-call", f"tool_calls is {kind_of(calls)}; it must be a list")
    return tuple(_tool_call(call) for call in calls)


def _tool_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RecordError("bad-tool-call", "a tool call must be an object with a function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise RecordError("bad-tool-call", "a tool call has no function.name")
    if isinstance(arguments, str):
        arguments = _arguments(arguments)
    if not isinstance(arguments, dict):
        raise RecordError("bad-tool-call", "function.arguments must be an object, or JSON text of one")
    kept = {key: value for key, value in call.items() if value is not None}
    # One form for both spellings: templates print the arguments as JSON, and would quote a text twice.
    return {"type": "function", **kept, "function": {**function, "arguments": arguments}}


def _arguments(text: str) -> Any:
    try:
        return parse_text(text)
    except RecordError as error:
        raise RecordError("bad-tool-call", f"function.arguments: {error.fault.message}") from None


def _spoken_call(content: Any) -> dict[str, Any]:
    """A ShareGPT ``function_call`` turn: its text is the call as JSON, {"name": …, "arguments": …}."""
    if not isinstance(content, str):
        raise RecordError("bad-tool-call", "a function_call turn must hold the call as JSON text")
    try:
        return _tool_call({"function": parse_text(content)})
    except RecordError as error:
        raise RecordError("bad-tool-call", error.fault.message) from None


def plain_turns(pairs: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Turns from (role, content) pairs, to be checked like any other turns."""
    return [{"role": role, "content": content} for role, content in pairs]
