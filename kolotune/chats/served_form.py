"""The form in which servers hand tools and tool calls to a chat template, whatever form a client sends.

Ollama reads a definition into types of its own (Tool and ToolProperty in its api/types.go) and writes it from them. So
keys come in the order of these types, and what they lack is lost: ``default``, ``minimum``, ``additionalProperties``,
``strict`` and others. Arguments of calls keep the order of their names, but not that inside of their values. Chats are
read in this form, so that they are trained as they are served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from kolotune.foundation.typed_storage import JsonObject

from .chat import Chat, Message, called_function

_WHOLE = 1e21  # below it, Go writes numbers without an exponent


def in_served_form(chat: Chat) -> Chat:
    """Return a chat with its tools and calls as Ollama hands them on; the same object if nothing changes.

    A definition that Ollama refuses stays as it is.
    """
    if chat.is_plain:
        return chat
    calls = any([message.tool_calls for message in (*chat.messages, *chat.rejected)])
    if not chat.tools and not calls:
        return chat
    tools = tuple(map(_tool, chat.tools))
    messages, rejected = chat.messages, chat.rejected
    if calls:
        messages, rejected = tuple(map(_message, messages)), tuple(map(_message, rejected))
    lost = tuple(sorted(set().union(*map(_lost_keys, chat.tools, tools))))
    return dataclasses.replace(chat, messages=messages, rejected=rejected, tools=tools, lost_tool_keys=lost)


def tool_as_served(tool: Mapping[str, object]) -> JsonObject:
    """Return a tool definition as the GGUF's template gets it.

    Behind Ollama, llama.cpp's server writes a description for each function, and none of the keys beside ``function``.
    It takes no function without a list of parameters, even an empty one; so such a function gets one.

    Raises:
        ValueError: Ollama refuses a request with this definition; the message says what is wrong.
    """
    function = _mapping(tool_as_read(tool), "function")
    schema = dict(_mapping(function, "parameters"))
    schema["type"] = schema["type"] or "object"
    schema["properties"] = schema["properties"] or {}
    served = {"name": function["name"], "description": function.get("description", ""), "parameters": schema}
    return {"type": "function", "function": served}


def tool_as_read(tool: Mapping[str, object]) -> JsonObject:
    """Return a tool definition as Ollama itself reads it.

    Raises:
        ValueError: Ollama refuses a request with this definition; the message says what is wrong.
    """
    function = _mapping(tool, "function")
    parameters = _mapping(function, "parameters")
    properties = parameters.get("properties")
    schema: JsonObject = {"type": _text(parameters, "type")}
    schema |= _given(parameters, "$defs", "items")
    schema |= _required(parameters)
    schema["properties"] = None if properties is None else _properties(parameters)
    if not (name := _text(function, "name")):
        raise ValueError("a function has no name")
    described: JsonObject = {"name": name}
    if description := _text(function, "description"):
        described["description"] = description
    described["parameters"] = schema
    return {"type": _text(tool, "type"), **_given(tool, "items"), "function": described}


def _property(value: object) -> JsonObject:
    if not isinstance(value, Mapping):
        raise ValueError("a property is not an object")
    read: JsonObject = {}
    if alternatives := _list(value, "anyOf"):
        read["anyOf"] = [_property(alternative) for alternative in alternatives]
    if (kind := _type(value)) is not None:
        read["type"] = kind
    read |= _given(value, "items")
    if description := _text(value, "description"):
        read["description"] = description
    if options := _list(value, "enum"):
        read["enum"] = [plain_json(option) for option in options]
    if value.get("properties") is not None:
        read["properties"] = _properties(value)
    return read | _required(value)


def _properties(schema: Mapping[str, object]) -> JsonObject:
    return {str(name): _property(value) for name, value in _mapping(schema, "properties").items()}


def _type(value: Mapping[str, object]) -> object:
    """The type of a property: a name, or a list of several."""
    kind = value.get("type")
    names = [kind] if isinstance(kind, str) else _list(value, "type")
    if any(not isinstance(name, str) for name in names):
        raise ValueError("a type is not a text")
    return (names[0] if len(names) == 1 else names) if names else None


def _required(schema: Mapping[str, object]) -> JsonObject:
    names = _list(schema, "required")
    if any(not isinstance(name, str) for name in names):
        raise ValueError("what is required is not a list of names")
    return {"required": names} if names else {}


def _given(value: Mapping[str, object], *names: str) -> JsonObject:
    """What Ollama passes on without knowing its structure."""
    return {name: plain_json(value[name]) for name in names if value.get(name) is not None}


def _mapping(container: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = container.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name} is not an object")
    return value or {}


def _list(container: Mapping[str, object], name: str) -> list[object]:
    value = container.get(name)
    if value is not None and not isinstance(value, list | tuple):
        raise ValueError(f"{name} is not a list")
    return list(value or ())


def _text(container: Mapping[str, object], name: str) -> str:
    value = container.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is not a text")
    return value or ""


def arguments_as_served(arguments: Mapping[str, object]) -> JsonObject:
    """Return the arguments of a tool call as the GGUF's template gets them from Ollama."""
    return {name: plain_json(value) for name, value in arguments.items()}


def plain_json(value: object) -> object:
    """Return a value as Ollama reads and writes it where it knows no structure: sorted by key, 2.0 as 2.

    Whole numbers beyond 2**53, which lose digits there, are left alone: an answer has to have all of them.
    """
    if isinstance(value, Mapping):
        return {str(key): plain_json(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < _WHOLE:
        return int(value)
    return value


def _tool(tool: JsonObject) -> JsonObject:
    wrapped = tool if "function" in tool else {"function": tool}  # some files leave out the object around it
    try:
        return tool_as_served({"type": "function", **wrapped})
    except ValueError:
        return tool


def _lost_keys(tool: JsonObject, served: JsonObject) -> set[str]:
    """Return the keys of a definition that are not handed on, or not as they are."""
    kept = set(_leaves(called_function(served)))
    lost = set(_leaves(called_function(tool))) - kept
    if not lost:
        return set()
    known = set(_locations(called_function(served)))
    return {
        next((parent for parent in _parents(place) if parent not in known), place).rpartition("/")[2]
        for place, _ in lost
    }


def _locations(value: object, place: str = "") -> Iterator[str]:
    """Yield the location of every key in a definition."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield f"{place}/{name}"
            yield from _locations(item, f"{place}/{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _locations(item, place)


def _parents(place: str) -> list[str]:
    """Return a location and those around it, from the outside."""
    names = place.split("/")
    return ["/".join(names[:end]) for end in range(2, len(names) + 1)]


def _leaves(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values in a definition that say something, each with the names of the objects around it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _leaves(item, f"{place}/{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, place)
    elif value is not None and value != "":
        yield place, str(plain_json(value))


def _message(message: Message) -> Message:
    if not message.tool_calls:
        return message
    return dataclasses.replace(message, tool_calls=tuple(map(_call, message.tool_calls)))


def _call(call: JsonObject) -> JsonObject:
    """Return a tool call in the order of keys in which llama.cpp's server hands it on."""
    function = called_function(call)
    if isinstance(arguments := function.get("arguments"), Mapping):
        function = {**function, "arguments": arguments_as_served(arguments)}
    served: JsonObject = {"type": "function", "function": function}
    return served | ({"id": call["id"]} if call.get("id") is not None else {})
