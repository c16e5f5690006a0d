"""What Ollama gives to a Go template: messages, tools and tool calls as Go values (template/template.go)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kolotune.chats.served_form import plain_json, tool_as_read
from kolotune.foundation.typed_storage import JsonObject

from .go_json import go_json
from .turn_format import merge_turns


@dataclass(frozen=True)
class GoObject:
    """A Go struct or map.

    Attributes:
        fields: what a template can ask for, by name.
        json: what the function ``json`` writes.
        prints: whether a template prints it as JSON; other structs it prints in Go's own way.
        is_map: whether a template can loop over it.
    """

    fields: Mapping[str, object]
    json: object = None
    prints: bool = False
    is_map: bool = False


@dataclass(frozen=True)
class Request:
    """What a request asks for besides its messages.

    Attributes:
        tools: the definitions, in the OpenAI format.
        think: whether to think; None: the request does not say, and the model can't.
    """

    tools: Sequence[Mapping[str, object]] = ()
    think: bool | None = None


def template_values(messages: Sequence[Mapping[str, object]], request: Request) -> dict[str, object]:
    """Return the fields of the dot.

    Raises:
        ValueError: Ollama refuses the tools.
    """
    return {
        "System": "\n\n".join(str(message["content"]) for message in messages if message["role"] == "system"),
        "Messages": [_message(turn) for turn in merge_turns(messages)],
        "Tools": [_tool(tool) for tool in request.tools],
        "Response": "",
        "Think": bool(request.think),
        "ThinkLevel": "",
        "IsThinkSet": request.think is not None,
    }


def _message(turn: Mapping[str, object]) -> GoObject:
    calls = turn.get("tool_calls") or []
    assert isinstance(calls, list | tuple)
    return GoObject(
        {
            "Role": turn["role"],
            "Content": turn["content"],
            "Thinking": turn.get("thinking") or "",
            "Images": [],
            "ToolCalls": [_call(call) for call in calls],
            "ToolName": turn.get("tool_name") or "",
            "ToolCallID": turn.get("tool_call_id") or "",
        }
    )


def _call(call: Mapping[str, object]) -> GoObject:
    function = call["function"]
    assert isinstance(function, Mapping)
    arguments = function.get("arguments")
    assert isinstance(arguments, Mapping)
    values = {
        "Index": function.get("index") or 0,
        "Name": function["name"],
        "Arguments": GoObject(arguments, plain_json(arguments), prints=True, is_map=True),
    }
    as_json = {name: plain_json(arguments) if name == "Arguments" else value for name, value in values.items()}
    identity = call.get("id") or ""
    return GoObject({"ID": identity, "Function": GoObject(values, as_json)}, {"ID": identity, "Function": as_json})


def _tool(tool: Mapping[str, object]) -> GoObject:
    """A definition for Go: the properties are in a map, which has no order of its own."""
    read = tool_as_read(tool)
    function = read["function"]
    assert isinstance(function, dict)
    schema = dict(function["parameters"])
    properties = schema["properties"]
    if properties is not None:
        schema["properties"] = {name: properties[name] for name in sorted(properties)}
    described = {"name": function["name"], "description": function.get("description", ""), "parameters": schema}
    as_json = {**read, "function": described}
    parameters = GoObject(
        {
            "Type": schema["type"],
            "Required": schema.get("required"),
            "Properties": GoObject(
                {name: _property(value) for name, value in (schema["properties"] or {}).items()},
                schema["properties"],
                prints=True,
                is_map=True,
            ),
        },
        schema,
    )
    values = {"Name": described["name"], "Description": described["description"], "Parameters": parameters}
    return GoObject({"Type": read["type"], "Function": GoObject(values, described)}, as_json, prints=True)


def _property(value: JsonObject) -> GoObject:
    kind = value.get("type", "")
    return GoObject(
        {
            # As templates print it; several types are printed as Go prints lists.
            "Type": f"[{' '.join(map(str, kind))}]" if isinstance(kind, list) else kind,
            "Description": value.get("description", ""),
            "Enum": value.get("enum"),
            "Required": value.get("required"),
        },
        value,
    )


def print_value(value: object) -> str:
    """Return what a template prints for a value.

    Raises:
        TypeError: Go's own form of it is not known.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, GoObject) and value.prints:
        return go_json(value.json)
    if isinstance(value, list) and value and all(isinstance(item, GoObject) and item.prints for item in value):
        return json_of(value)
    raise TypeError(f"printing a {type(value).__name__} is not supported")


def json_of(value: object) -> str:
    """Return what the function ``json`` writes for a value.

    Raises:
        TypeError: its JSON is not known.
    """
    if isinstance(value, list):
        return "[" + ",".join(map(json_of, value)) + "]"
    if isinstance(value, GoObject):
        if value.json is None and not value.is_map:
            raise TypeError("a message as JSON is not supported")
        return go_json(value.json)
    return go_json(value)
