"""Read tool definitions, in every form that data sets have them."""

from __future__ import annotations

from collections.abc import Mapping

from kolotune.foundation.typed_storage import JsonObject

from .faults import FaultKind, RecordError, fail
from .json_values import json_or_value, kind_of, list_or_value
from .printable import quoted

_SCHEMA_KEYS = (
    "parameters", "input_schema", "inputSchema", "parametersJsonSchema", "args_schema", "args", "arguments",
)  # fmt: skip
"""Keys of the schema of a tool's arguments: OpenAI's, Anthropic's, that of MCP and Bedrock, Google's, LangChain's."""
_WRAPPERS = ("function", "toolSpec", "tool_spec")
_NOT_OFFERED = ("type", "cache_control")
"""Keys beside Anthropic's schema that are about its API, not about the tool."""
_READ_KEYS = frozenset({
    *_SCHEMA_KEYS, *_WRAPPERS, "name", "description", "type", "strict", "outputSchema", "output_schema", "returns",
    "return", "response", "responses", "results", "annotations",
})  # fmt: skip
_JSON_TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number",
    "number": "number", "bool": "boolean", "boolean": "boolean", "list": "array", "array": "array", "tuple": "array",
    "set": "array", "dict": "object", "object": "object",
}  # fmt: skip


def read_tools(value: object) -> tuple[JsonObject, ...]:
    """Read the tool definitions of a record: a list of objects, the same as JSON text, or nothing.

    Definitions in the forms of Anthropic, Google and plain Python signatures get OpenAI's.

    Raises:
        RecordError: The value is something else.
    """
    try:
        tools = list_or_value(value)
        tools = [list_or_value(tool) for tool in tools] if isinstance(tools, list) else tools
    except RecordError as error:
        raise error.within(FaultKind.BAD_TOOLS, "tools") from None
    if tools is None or tools == "" or tools == []:
        return ()
    if isinstance(tools, dict) and any(key in tools for key in ("name", "functionDeclarations", *_WRAPPERS)):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        fail(FaultKind.BAD_TOOLS, "tools must be a list of objects")
    declared: list[JsonObject] = []
    for tool in tools:
        inner = tool.get("functionDeclarations", tool.get("function_declarations"))
        declared += [one for one in inner if isinstance(one, dict)] if isinstance(inner, list) else [tool]
    return tuple(map(_definition, declared))


def _definition(tool: JsonObject) -> JsonObject:
    for wrapper in _WRAPPERS:
        function = tool.get(wrapper)
        if isinstance(function, dict):
            read = _with_parameters(function)
            if wrapper != "function":
                return read
            return tool if read is function else {**tool, wrapper: read}
    return _with_parameters(tool)


def _with_parameters(function: JsonObject) -> JsonObject:
    """Return a function with the schema of its arguments as ``parameters``; the same object if it has it there."""
    key = next((key for key in _SCHEMA_KEYS if function.get(key)), None)
    if key is None:
        other = next((name for name, value in function.items() if name not in _READ_KEYS and _says_schema(value)), None)
        if other is not None:
            cause = f"a definition has its schema under {quoted(other, 30)}"
            fail(FaultKind.BAD_TOOLS, f"{cause}; name it parameters", subject=quoted(other, 30))
        return function
    given = function[key]
    try:
        schema = json_or_value(given)
    except RecordError as error:
        raise error.within(FaultKind.BAD_TOOLS, f"{key} of a tool") from None
    if isinstance(schema, dict) and set(schema) == {"json"}:  # Bedrock
        schema = schema["json"]
    if not _is_schema(schema):
        schema = _schema(schema)
    if key == "parameters":
        return function if schema is given else {**function, "parameters": schema}
    if not isinstance(schema, dict):
        fail(FaultKind.BAD_TOOLS, f"{key} of a tool is {kind_of(schema)}; it must be a JSON schema")
    kept = {name: value for name, value in function.items() if name not in (*_SCHEMA_KEYS, *_NOT_OFFERED)}
    return {**kept, "parameters": schema}


def _says_schema(value: object) -> bool:
    """Whether a value is a JSON schema with properties, maybe with an object around it."""
    if not isinstance(value, Mapping):
        return False
    inner = [value, *value.values()] if len(value) == 1 else [value]
    return any([isinstance(each, Mapping) and isinstance(each.get("properties"), Mapping) for each in inner])


def _is_schema(parameters: object) -> bool:
    """Whether parameters are a JSON schema, or nothing that could be made one."""
    if not isinstance(parameters, dict) or not parameters or "properties" in parameters or "$ref" in parameters:
        return True
    return not all(isinstance(value, dict) and isinstance(value.get("type"), str) for value in parameters.values())


def _schema(parameters: object) -> JsonObject:
    """Return the JSON schema of parameters by name, as xLAM has them: ``{"a": {"type": "int, optional"}}``."""
    properties: JsonObject = {}
    required = []
    for name, parameter in (parameters if isinstance(parameters, dict) else {}).items():
        kind, _, more = str(parameter["type"]).partition(",")
        known = _JSON_TYPES.get(kind.split("[")[0].strip().lower())
        properties[name] = {**parameter, "type": known or kind}
        if "optional" not in more and "default" not in parameter:
            required.append(name)
    schema: JsonObject = {"type": "object", "properties": properties}
    return {**schema, "required": required} if required else schema
