"""Tools and calls as Ollama hands them on; the rendering by Go is tested with its templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.observed import CHATS

from kolotune.chats import Chat, Message
from kolotune.chats.reading.files import read_chats
from kolotune.chats.served_form import in_served_form, plain_json, tool_as_read, tool_as_served


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
    assert json.dumps(tool_as_served(tool)) == (
        '{"type": "function", "function": {"name": "f", "description": "", '
        '"parameters": {"type": "object", "$defs": {"x": 2, "y": 1}, '
        '"required": ["b"], "properties": {"b": {"type": "string", "description": "d"}, "a": {}}}}}'
    )


def test_what_ollama_wrote_stays() -> None:
    (tool,) = CHATS["tools"]["tools"]
    assert json.dumps(tool_as_served(tool)) == json.dumps(tool)
    nested = {"anyOf": [{"type": "null"}], "items": {"b": 1, "a": 2}, "enum": [1], "properties": {"z": {}, "y": {}}}
    once = tool_as_served({"type": "function", "function": {"name": "f", "parameters": {"properties": {"p": nested}}}})
    assert json.dumps(tool_as_served(once)) == json.dumps(once)
    assert '"items": {"a": 2, "b": 1}' in json.dumps(once) and '"z": {}, "y": {}' in json.dumps(once)


def test_a_function_without_parameters() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d"}}
    assert tool_as_read(tool)["function"] == {
        "name": "f",
        "description": "d",
        "parameters": {"type": "", "properties": None},
    }
    served = tool_as_served(tool)["function"]
    assert served == {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "function",
    [
        {"name": 1},
        {"name": ""},
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
        tool_as_served({"type": "function", "function": function})


def chat(*messages: Message, tools: tuple[dict[str, Any], ...] = ()) -> Chat:
    return Chat((Message("user", "q"), *messages, Message("assistant", "a")), tools=tools)


def test_chats_are_read_in_this_form(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {}, "type": "object"}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": {"z": 2.0, "y": 1}, "a": 1.5}}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": turns, "tools": [tool]}) + "\n", encoding="utf-8")
    (read,) = read_chats([path]).chats
    assert json.dumps(read.tools) == '[{"type": "function", "function": {"name": "f", ' + (
        '"description": "", "parameters": {"type": "object", "properties": {}}}}]'
    )
    assert json.dumps(read.messages[1].tool_calls[0]["function"]) == (
        '{"name": "f", "arguments": {"b": {"y": 1, "z": 2}, "a": 1.5}}'
    )
    assert not read.lost_tool_keys and in_served_form(read) == read


def test_calls_have_the_order_of_the_server() -> None:
    call: dict[str, Any] = {"id": "1", "function": {"name": "f", "arguments": {}}}
    read = in_served_form(chat(Message("assistant", "", tool_calls=(call,))))
    expected = '{"type": "function", "function": {"name": "f", "arguments": {}}, "id": "1"}'
    assert json.dumps(read.messages[1].tool_calls[0]) == expected


def test_what_says_more_is_noted() -> None:
    plain = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": ["string"]}}}}}
    assert not in_served_form(chat(tools=(plain,))).lost_tool_keys
    schemas: dict[str, dict[str, Any]] = {
        "default": {"default": 1},
        "minimum": {"minimum": 0},
        "pattern": {"properties": {"b": {"pattern": "x"}}},
    }
    for lost, schema in schemas.items():
        properties = {"a": {"type": "string", **schema}}
        tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
        assert in_served_form(chat(tools=(plain, tool))).lost_tool_keys == (lost,)


def test_a_lost_object_is_named_itself() -> None:
    function = {"name": "f", "parameters": {"properties": {}, "additionalProperties": False}}
    tool = {"function": {**function, "returns": {"type": "string"}}}
    assert in_served_form(chat(tools=(tool,))).lost_tool_keys == ("additionalProperties", "returns")


def test_a_definition_that_is_refused_stays() -> None:
    odd = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 1}}}}
    read = in_served_form(chat(tools=(odd,)))
    assert read.tools == (odd,) and not read.lost_tool_keys


def test_a_chat_without_tools_is_the_same_object() -> None:
    plain = chat()
    assert in_served_form(plain) is plain


@pytest.mark.parametrize(
    ("value", "served"),
    [
        (2.0, 2),
        (True, True),
        (1e21, 1e21),
        (0.5, 0.5),
        (2**53 + 1, 2**53 + 1),
        (None, None),
        ({"b": [1.0], "a": "x"}, '{"a": "x", "b": [1]}'),
    ],
)
def test_values(value: object, served: object) -> None:
    expected = served if isinstance(served, str) else json.dumps(served)
    assert json.dumps(plain_json(value)) == expected
