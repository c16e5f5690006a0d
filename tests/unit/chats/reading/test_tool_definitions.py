"""Tool definitions: the schema is read under every key that data sets have it under, and never lost."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.chats.reading.faults import FaultKind, RecordError
from kolotune.chats.reading.tool_definitions import read_tools

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
READ = {"name": "f", "description": "d", "parameters": SCHEMA}
NAMED = {"name": "f", "description": "d"}


@pytest.mark.parametrize(
    "tool",
    [
        READ,
        {**NAMED, "input_schema": SCHEMA},
        {**NAMED, "input_schema": SCHEMA, "type": "custom", "cache_control": {"type": "ephemeral"}},
        {**NAMED, "inputSchema": SCHEMA},
        {**NAMED, "inputSchema": {"json": SCHEMA}},
        {"toolSpec": {**NAMED, "inputSchema": {"json": SCHEMA}}},
        {**NAMED, "parameters": None, "args_schema": SCHEMA},
        {**NAMED, "args": {"x": {"type": "integer"}}},
        {**NAMED, "arguments": SCHEMA},
        {**NAMED, "args": '{"x": {"type": "int"}}'},
    ],
)
def test_keys_of_the_schema(tool: dict[str, Any]) -> None:
    assert read_tools([tool]) == (READ,)


def test_within_function() -> None:
    assert read_tools([{"type": "function", "function": {**NAMED, "inputSchema": SCHEMA}}]) == (
        {"type": "function", "function": READ},
    )
    tool = {"type": "function", "function": READ}
    assert read_tools([tool])[0] is tool


@pytest.mark.parametrize("more", [{"payload": SCHEMA}, {"payload": {"json": SCHEMA}}, {"args": ["x"]}])
def test_a_schema_that_would_be_lost_is_refused(more: dict[str, Any]) -> None:
    for tool in ({**NAMED, **more}, {"function": {**NAMED, **more}}):
        with pytest.raises(RecordError) as error:
            read_tools([tool])
        assert error.value.fault.kind is FaultKind.BAD_TOOLS


def test_the_schema_of_a_result_is_none_of_the_arguments() -> None:
    tool = {**NAMED, "outputSchema": SCHEMA}
    assert read_tools([tool]) == (tool,)
