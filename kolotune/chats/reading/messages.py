"""Turn the turns of a record, whatever names they use, into `Message` objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kolotune.foundation.typed_storage import JsonObject

from ..chat import ROLES, Message
from .faults import Fault, FaultKind, RecordError, fail
from .printable import printable, quoted
from .strict_json import parse_text

ROLE_NAMES = {
    **{role: role for role in ROLES}, "developer": "system", "human": "user", "gpt": "assistant",
    "model": "assistant", "function_call": "assistant", "function": "tool", "observation": "tool",
}  # fmt: skip
"""Every known name of a role, and the role that it means."""

# Training on a turn that its author excluded would be worse than rejecting the chat.
_EXCLUSIONS = {"weight": 1, "train": True, "training": True}
_TYPE_NAMES: dict[type, str] = {
    str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip


def read_turns(raw: object, first: int = 1) -> tuple[list[Message], list[Fault]]:
    """Read a list of turns with OpenAI's keys (role, content) or ShareGPT's (from, value).

    Args:
        raw: The value that should be the turns.
        first: The number of the first turn in messages to the user.

    Returns:
        The messages and every fault. The messages are complete only if there is no fault.
    """
    if not isinstance(raw, list):
        return [], [Fault(FaultKind.NO_MESSAGES, f"the turns are {kind_of(raw)}; they must be a list of objects")]
    if not raw:
        return [], [Fault(FaultKind.NO_MESSAGES, "the list of turns is empty")]
    messages: list[Message] = []
    faults: list[Fault] = []
    for number, turn in enumerate(raw, first):
        if (plain := _plain_turn(turn)) is not None:
            messages.append(plain)
            continue
        try:
            messages.append(_read_turn(turn))
        except RecordError as error:
            faults.append(dataclasses.replace(error.fault, turn=number))
    return messages, faults


def kind_of(value: object) -> str:
    """Return the JSON name of a value's type with its article, for messages."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def json_or_value(value: object) -> object:
    """Parse a list that is written as JSON text, as in tables and some JSON Lines files; return other values as is.

    Raises:
        RecordError: The text is not JSON.
    """
    if isinstance(value, str) and value.strip():
        return parse_text(value)
    return value


def read_tools(value: object) -> tuple[JsonObject, ...]:
    """Read the tool definitions of a record: a list of objects, the same as JSON text, or nothing.

    Raises:
        RecordError: The value is something else.
    """
    try:
        tools = json_or_value(value)
    except RecordError as error:
        raise error.within(FaultKind.BAD_TOOLS, "tools") from None
    if tools is None or tools == "" or tools == []:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        fail(FaultKind.BAD_TOOLS, "tools must be a list of objects")
    return tuple(tools)


def _plain_turn(turn: object) -> Message | None:
    """Read a turn that is a role and a text and nothing else, as most are: the fast path of `_read_turn`."""
    if type(turn) is dict and len(turn) == 2 and "role" in turn and "content" in turn:
        role, content = turn["role"], turn["content"]
        if type(content) is str and type(role) is str and role in ROLES:
            return Message(role, content)
    return None


def _read_turn(turn: object) -> Message:
    if not isinstance(turn, dict):
        fail(FaultKind.BAD_MESSAGE, f"{kind_of(turn)}; it must be an object with role and content")
    name = _role_name(turn)
    role = ROLE_NAMES[name]
    _refuse_exclusion(turn)
    raw_content = _first_of(turn, "content", "value")
    calls = _tool_calls(turn, role)
    if name == "function_call":
        calls, raw_content = (_call_in_text(raw_content),), None
    return Message(
        role=role,
        content=_content(raw_content, role, bool(calls)),
        reasoning=_reasoning(turn, role),
        tool_calls=calls,
        name=_text_or_none(turn, "name") if role == "tool" else None,
        tool_call_id=_text_or_none(turn, "tool_call_id") if role == "tool" else None,
    )


def _first_of(turn: JsonObject, *keys: str) -> object:
    # Parquet gives every turn every key of the column, most of them null: null means absent.
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _role_name(turn: JsonObject) -> str:
    name = _first_of(turn, "role", "from")
    if name is None:
        fail(FaultKind.MISSING_ROLE, f"no role; known: {', '.join(ROLES)}")
    if not isinstance(name, str):
        fail(FaultKind.UNKNOWN_ROLE, f"the role is {kind_of(name)}; known: {', '.join(ROLES)}")
    if name not in ROLE_NAMES:
        fail(FaultKind.UNKNOWN_ROLE, f"unknown role {quoted(name, 30)}; known: {', '.join(ROLE_NAMES)}")
    return name


def _refuse_exclusion(turn: JsonObject) -> None:
    for key, neutral in _EXCLUSIONS.items():
        value = turn.get(key)
        if value is not None and value != neutral:
            shown = printable(str(value).lower(), 20)
            cause = f"{key}: {shown} (don't train on this turn) is not supported; remove the turn or the key"
            fail(FaultKind.NOT_SUPPORTED, cause)


def _content(raw: object, role: str, has_calls: bool) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, list):
        return "".join(_part_text(part) for part in raw)
    if raw is None and role == "assistant" and has_calls:
        return ""
    if raw is None:
        fail(FaultKind.MISSING_CONTENT, f"the {role}'s content is missing or null")
    fail(FaultKind.BAD_CONTENT, f"the {role}'s content is {kind_of(raw)}; it must be a text")


def _part_text(part: object) -> str:
    if not isinstance(part, dict):
        fail(FaultKind.UNSUPPORTED_CONTENT, f"a content part is {kind_of(part)}; it must be an object")
    kind, text = part.get("type"), part.get("text")
    if kind == "text" and isinstance(text, str):
        return text
    shown = quoted(kind, 30) if isinstance(kind, str) else kind_of(kind)
    fail(FaultKind.UNSUPPORTED_CONTENT, f"unsupported content of type {shown}; only text can be trained on")


def _reasoning(turn: JsonObject, role: str) -> str | None:
    reasoning = _first_of(turn, "reasoning_content", "reasoning")
    if reasoning is None or reasoning == "":
        return None
    if not isinstance(reasoning, str):
        fail(FaultKind.BAD_REASONING, f"the reasoning is {kind_of(reasoning)}; it must be a text")
    if role != "assistant":
        fail(FaultKind.BAD_REASONING, f"a {role} turn has reasoning; only an assistant turn may")
    return reasoning


def _text_or_none(turn: JsonObject, key: str) -> str | None:
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        fail(FaultKind.BAD_TOOL_TURN, f"{key} is {kind_of(value)}; it must be a text")
    return value


def _tool_calls(turn: JsonObject, role: str) -> tuple[JsonObject, ...]:
    calls = turn.get("tool_calls")
    legacy = turn.get("function_call")
    if legacy is not None and not calls:
        # OpenAI's format before tool_calls; without this the answer would lose its call.
        calls = [{"function": legacy}]
    if calls is None or calls == []:
        return ()
    if role != "assistant":
        fail(FaultKind.BAD_TOOL_CALL, f"a {role} turn has tool_calls; only an assistant turn may")
    if not isinstance(calls, list):
        fail(FaultKind.BAD_TOOL_CALL, f"tool_calls is {kind_of(calls)}; it must be a list")
    return tuple(_tool_call(call) for call in calls)


def _tool_call(call: object) -> JsonObject:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        fail(FaultKind.BAD_TOOL_CALL, "a tool call must be an object with a function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        fail(FaultKind.BAD_TOOL_CALL, "a tool call has no function.name")
    if isinstance(arguments, str):
        try:
            arguments = parse_text(arguments)
        except RecordError as error:
            raise error.within(FaultKind.BAD_TOOL_CALL, "function.arguments") from None
    if not isinstance(arguments, dict):
        fail(FaultKind.BAD_TOOL_CALL, "function.arguments must be an object, or JSON text of one")
    kept = {key: value for key, value in call.items() if value is not None}
    # The same object for both spellings: templates print the arguments as JSON, and would quote a text twice.
    return {"type": "function", **kept, "function": {**function, "arguments": arguments}}


def _call_in_text(content: object) -> JsonObject:
    """Read a ShareGPT ``function_call`` turn, whose text is the call as JSON: {"name": …, "arguments": …}."""
    if not isinstance(content, str):
        fail(FaultKind.BAD_TOOL_CALL, "a function_call turn must contain the call as JSON text")
    try:
        return _tool_call({"function": parse_text(content)})
    except RecordError as error:
        raise error.within(FaultKind.BAD_TOOL_CALL, error.fault.field) from None


def plain_turns(pairs: Sequence[tuple[str, object]]) -> list[JsonObject]:
    """Return turns made of (role, content) pairs, to be checked like any other turns."""
    return [{"role": role, "content": content} for role, content in pairs]
