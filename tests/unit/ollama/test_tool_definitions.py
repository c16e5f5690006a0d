"""Tool definitions as Ollama hands them on; the rendering by Go is tested with its templates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.observed import CHATS

from kolotune.ollama.tool_definitions import as_read


def test_order_and_losses() -> None:
    tool = {
        "function": {
            "parameters": {
                "additionalProperties": False,
                "properties": {"b": {"default": 1, "description": "d", "type": ["string"]}, "a": {}},
                "required": ["b"],
                "type": "object",
                "$defs": {"y": 1, "x": 2},
            },
            "strict": True,
            "description": "",
            "name": "f",
        },
        "type": "function",
    }
    # The order counts, hence the text.
    assert json.dumps(as_read(tool)) == (
        '{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "$defs": {"x": 2, "y": 1}, '
        '"required": ["b"], "properties": {"b": {"type": "string", "description": "d"}, "a": {}}}}}'
    )


def test_what_ollama_wrote_stays() -> None:
    (tool,) = CHATS["tools"]["tools"]
    assert json.dumps(as_read(tool)) == json.dumps(tool)
    nested = {"anyOf": [{"type": "null"}], "items": {"b": 1, "a": 2}, "enum": [1], "properties": {"z": {}, "y": {}}}
    once = as_read({"type": "function", "function": {"name": "f", "parameters": {"properties": {"p": nested}}}})
    assert json.dumps(as_read(once)) == json.dumps(once)
    assert '"items": {"a": 2, "b": 1}' in json.dumps(once) and '"z": {}, "y": {}' in json.dumps(once)


def test_a_function_without_parameters() -> None:
    read = as_read({"type": "function", "function": {"name": "f", "description": "d"}})
    assert read["function"] == {"name": "f", "description": "d", "parameters": {"type": "", "properties": None}}


@pytest.mark.parametrize(
    "function",
    [
        {"name": 1},
        {"name": "f", "parameters": []},
        {"name": "f", "parameters": {"required": "a"}},
        {"name": "f", "parameters": {"required": [1]}},
        {"name": "f", "parameters": {"properties": {"a": "text"}}},
        {"name": "f", "parameters": {"properties": {"a": {"type": 1}}}},
        {"name": "f", "parameters": {"properties": {"a": {"type": [1]}}}},
    ],
)
def test_definitions_that_are_refused(function: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        as_read({"type": "function", "function": function})
