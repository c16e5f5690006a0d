"""Read tool calls, in every form that data sets have them."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from kolotune.foundation.typed_storage import JsonObject

from .faults import FaultKind, RecordError, fail
from .json_values import json_or_value, kind_of, list_or_value
from .strict_json import parse_text

_NAME_KEYS = ("name", "tool_name", "function_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "tool_input")
_ID_KEYS = ("id", "tool_call_id", "call_id")
_CALL_IN_TEXT = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_CALL_MARKS = (
    "<tool_call>",
    "<functioncall>",
    "<function=",
    "<function_calls>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "```tool_code",
)
# ToolBench, and agents in the manner of ReAct.
_ACTION = re.compile(r"^[ \t]*Action:.*\s+^[ \t]*Action Input:", re.MULTILINE)
# Glaive quotes the arguments, which are JSON themselves, with single quotes.
_QUOTED_ARGUMENTS = re.compile(r'("arguments"\s*:\s*)\'(.*)\'(\s*\})', re.DOTALL)


def read_calls(calls: object) -> tuple[JsonObject, ...]:
    """Read the calls of an assistant turn: a list, or the same as JSON text.

    Raises:
        RecordError: The value is something else.
    """
    try:
        calls = list_or_value(calls)
    except RecordError as error:
        raise error.within(FaultKind.BAD_TOOL_CALL, "tool_calls") from None
    if calls is None or calls == [] or calls == "":
        return ()
    if isinstance(calls, dict) and calls:
        calls = [calls]
    if not isinstance(calls, list):
        fail(FaultKind.BAD_TOOL_CALL, f"tool_calls is {kind_of(calls)}; it must be a list")
    return tuple([_call(call) for call in calls])


def calls_of_text(content: object) -> tuple[JsonObject, ...]:
    """Read a turn that is a call, or a list of calls, as JSON text: {"name": …, "arguments": …}.

    Raises:
        RecordError: The text is something else.
    """
    try:
        value = _loose_json(content) if isinstance(content, str) else content
        if value is None or isinstance(value, str):
            fail(FaultKind.BAD_TOOL_CALL, "a function_call turn must contain the call as JSON text")
        return tuple([_call(call) for call in (value if isinstance(value, list) else [value])])
    except RecordError as error:
        raise error.within(FaultKind.BAD_TOOL_CALL, error.fault.field) from None


def separate_calls(text: str) -> tuple[str, tuple[JsonObject, ...]] | None:
    """Return a text without its ``<tool_call>`` elements, and these as calls; None if not all can be read."""
    try:
        calls = [call for match in _CALL_IN_TEXT.finditer(text) for call in calls_of_text(match[1])]
    except RecordError:
        return None
    rest = _CALL_IN_TEXT.sub("", text)
    return None if "<tool_call>" in rest else (rest.strip(), tuple(calls))


def writes_call(text: str) -> bool:
    """Whether a text contains a tool call, as text."""
    return any(mark in text for mark in _CALL_MARKS) or ("Action" in text and _ACTION.search(text) is not None)


def _loose_json(text: str) -> object:
    """Parse JSON, or what data sets write instead: elements, a Python literal, arguments in single quotes."""
    text = text.strip().removeprefix("<functioncall>").strip()
    if match := _CALL_IN_TEXT.search(text):
        return [_loose_json(each[1]) for each in _CALL_IN_TEXT.finditer(text)] if match else None
    try:
        return parse_text(text)
    except RecordError:
        if match := _QUOTED_ARGUMENTS.search(text):
            call = parse_text(text[: match.start()] + f"{match[1]}null{match[3]}")
            return {**call, "arguments": parse_text(match[2])} if isinstance(call, dict) else call
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            pass
        raise


def _call(call: object) -> JsonObject:
    try:
        call = json_or_value(call)
    except RecordError as error:
        raise error.within(FaultKind.BAD_TOOL_CALL) from None
    if not isinstance(call, dict):
        fail(FaultKind.BAD_TOOL_CALL, "a tool call must be an object with a function")
    function, is_flat = call.get("function"), False
    if not isinstance(function, dict):
        function, is_flat = _flat_function(call), True
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        fail(FaultKind.BAD_TOOL_CALL, "a tool call has no function.name")
    arguments = _arguments(function)
    # The same object for both spellings: templates print the arguments as JSON, and would quote a text twice.
    if is_flat:
        given = next((call[key] for key in _ID_KEYS if call.get(key) is not None), None)
        kept = {} if given is None else {"id": given}
        return {"type": "function", **kept, "function": {"name": name, "arguments": arguments}}
    kept = {key: value for key, value in call.items() if value is not None}
    return {"type": "function", **kept, "function": {**function, "arguments": arguments}}


def _flat_function(call: Mapping[str, object]) -> JsonObject:
    """Return the function of a call without an object around it."""
    name = next((call[key] for key in _NAME_KEYS if call.get(key) is not None), call.get("function"))
    if name is None:
        fail(FaultKind.BAD_TOOL_CALL, "a tool call must be an object with a function")
    arguments = next((call[key] for key in _ARGUMENT_KEYS if call.get(key) is not None), None)
    return {"name": name, "arguments": arguments}


def _arguments(function: Mapping[str, object]) -> JsonObject:
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = parse_text(arguments)
        except RecordError as error:
            raise error.within(FaultKind.BAD_TOOL_CALL, "function.arguments") from None
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if not isinstance(arguments, dict):
        fail(FaultKind.BAD_TOOL_CALL, "function.arguments must be an object, or JSON text of one")
    return arguments
