"""What Ollama makes of tool definitions before a template sees them.

Ollama reads a definition into types of its own (Tool and ToolProperty in api/types.go) and writes it from them. So keys
come in the order of these types, and what they lack is lost: ``default``, ``minimum``, ``additionalProperties``,
``strict`` and others.
"""

from __future__ import annotations

from collections.abc import Mapping

from kolotune.foundation.typed_storage import JsonObject

from .go_json import sorted_keys


def as_read(tool: Mapping[str, object]) -> JsonObject:
    """Return a tool definition as the GGUF's template gets it from Ollama.

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
    described: JsonObject = {"name": _text(function, "name")}
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
        read["enum"] = [sorted_keys(option) for option in options]
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
    return {name: sorted_keys(value[name]) for name in names if value.get(name) is not None}


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
