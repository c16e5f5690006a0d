"""Read the content of a turn: a text, or a list of parts in the forms of OpenAI, Anthropic and Google."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from kolotune.foundation.typed_storage import JsonObject

from .faults import FaultKind, fail
from .json_values import kind_of
from .printable import quoted
from .tool_calls import read_calls

_TEXT_TYPES = frozenset({"text", "input_text", "output_text"})


@dataclass
class Content:
    """What a turn contains.

    Attributes:
        texts: Its texts.
        thoughts: Its thoughts.
        calls: Its tool calls.
        results: The results of tools in it: the call's id, the tool's name, and the text.
        unread: Keys of its parts that say something and are not read, with their values.
    """

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[JsonObject] = field(default_factory=list)
    results: list[tuple[str | None, str | None, str]] = field(default_factory=list)
    unread: list[tuple[str, object]] = field(default_factory=list)


def read_content(raw: object, role: str) -> Content | None:
    """Read the content of a turn; None if there is none.

    Raises:
        RecordError: It is neither a text nor a list of known parts.
    """
    if isinstance(raw, str):
        return Content([raw])
    if raw is None:
        return None
    if isinstance(raw, dict) and isinstance(raw.get("parts"), list):
        raw = raw["parts"]
    elif isinstance(raw, dict) and role != "tool" and isinstance(raw.get("text"), str):
        raw = [raw]
    if isinstance(raw, list):
        content = Content()
        for part in raw:
            _add(content, part)
        return content
    if isinstance(raw, dict) and role == "tool":
        return Content([as_json(raw)])
    fail(FaultKind.BAD_CONTENT, f"the {role}'s content is {kind_of(raw)}; it must be a text")


def plain_text(raw: object, name: str) -> str:
    """Return a text, which may be written as a list of parts; "" if there is none.

    Raises:
        RecordError: It is something else.
    """
    if isinstance(raw, dict) and "content" in raw:
        raw = raw["content"]
    if isinstance(raw, list | dict) and (not isinstance(raw, dict) or "parts" in raw):
        content = read_content(raw, name)
        return "".join(content.texts) if content else ""
    if raw is None or isinstance(raw, str):
        return raw or ""
    fail(FaultKind.BAD_CONTENT, f"{name} is {kind_of(raw)}; it must be a text")


def as_json(value: object) -> str:
    """Return the JSON text of a value."""
    return json.dumps(value, ensure_ascii=False)


def _add(content: Content, part: object) -> None:
    if not isinstance(part, dict):
        fail(FaultKind.UNSUPPORTED_CONTENT, f"a content part is {kind_of(part)}; it must be an object")
    part = {key: value for key, value in part.items() if value is not None}  # Parquet's structs have every key
    kind = part.get("type")
    text = part.get("text")
    if (kind in _TEXT_TYPES or (kind is None and len(part) == 1)) and isinstance(text, str):
        if content.calls and text.strip():
            cause = "a text follows the tool call in one content, but templates write it before the call"
            fail(FaultKind.BAD_TOOL_CALL, f"{cause}; move it there, or into a turn after the result")
        content.texts.append(text)
    elif isinstance(text, str) and (kind == "reasoning" or (kind is None and part.get("thought") is True)):
        content.thoughts.append(text)
    elif kind == "thinking" and (thought := _thought(part.get("thinking"))) is not None:
        content.thoughts.append(thought)
    elif kind == "tool_use":
        content.calls += read_calls([part])
    elif kind == "tool_result":
        content.results.append((_text(part.get("tool_use_id")), None, _result(part.get("content"))))
        if part.get("is_error"):
            content.unread.append(("is_error", part["is_error"]))
    elif kind is None and isinstance(call := part.get("functionCall", part.get("function_call")), dict):
        content.calls += read_calls([call])
    elif kind is None and isinstance(answer := part.get("functionResponse", part.get("function_response")), dict):
        content.results.append((_text(answer.get("id")), _text(answer.get("name")), _result(answer.get("response"))))
    else:
        shown = quoted(kind, 30) if isinstance(kind, str) else kind_of(kind)
        cause = f"unsupported content of type {shown}; only text can be trained on"
        fail(FaultKind.UNSUPPORTED_CONTENT, cause, subject=shown)


def _thought(value: object) -> str | None:
    """Return a thought, which Mistral writes as a list of parts; None for what is none."""
    if isinstance(value, list):
        parts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for text in parts if isinstance(text, str)]
        return "".join(texts) if len(texts) == len(value) else None
    return _text(value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _result(value: object) -> str:
    if isinstance(value, list):
        content = read_content(value, "tool")
        return "".join(content.texts) if content else ""
    if value is None or isinstance(value, str):
        return value or ""
    return as_json(value)
