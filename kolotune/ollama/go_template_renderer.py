"""Render a Go template as Ollama does.

The TEMPLATE of a Modelfile is rendered as it is written there, whoever wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .go_template_parser import TemplateNode, Word, parse_go_template, refuse
from .go_values import GoObject, Request, json_of, print_value, template_values

_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


def render_go_template(
    template: str,
    messages: Sequence[Mapping[str, object]],
    system: str | None = None,
    request: Request | None = None,
) -> str:
    """Return the prompt that Ollama makes of a conversation.

    Args:
        template: the text of TEMPLATE; it has to loop over the messages.
        messages: turns as in Ollama's API: `role` and `content`, and where there are such `thinking`, `tool_calls`,
            `tool_name`. Neighbours of one role are merged, as Ollama does.
        system: of the Modelfile; it is put before a conversation that has no system turn at its start.
        request: tools, and whether to think.

    Raises:
        ArtifactError: the template is invalid, or uses more of the language than is known.
    """
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    if ".Messages" not in template:
        refuse("it does not loop over .Messages")
    output: list[str] = []
    try:
        dot = GoObject(template_values(messages, request or Request()))
    except ValueError as error:
        refuse(f"Ollama does not read these tools: {error}")
    _write(parse_go_template(template), _TemplateScope(dot, {"$": dot}), output)
    return "".join(output)


class _Jump(Exception):
    """Ends one turn of a loop, or the loop."""

    def __init__(self, ends_loop: bool) -> None:
        super().__init__()
        self.ends_loop = ends_loop


@dataclass
class _TemplateScope:
    """The dot and the variables of a block, and the block outside of it."""

    dot: object
    variables: dict[str, object]
    outer: _TemplateScope | None = None

    def inner(self, dot: object) -> _TemplateScope:
        return _TemplateScope(dot, {}, self)

    def defining(self, name: str) -> _TemplateScope:
        """The innermost scope that defines a variable."""
        scope: _TemplateScope | None = self
        while scope is not None:
            if name in scope.variables:
                return scope
            scope = scope.outer
        refuse(f"{name} is not defined")


def _write(nodes: Sequence[TemplateNode], scope: _TemplateScope, output: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            output.append(node.text)
        elif node.kind == "action":
            if not _assign(node.words, scope):
                output.append(_printed(_evaluate(node.words, scope)))
        elif node.kind == "jump":
            raise _Jump(ends_loop=node.text == "break")
        elif node.kind == "if":
            branch = node.body if _is_true(_evaluate(node.words, scope)) else node.otherwise
            _write(branch, scope.inner(scope.dot), output)
        else:
            _write_loop(node, scope, output)


def _assign(words: list[Word], scope: _TemplateScope) -> bool:
    """Carry out ``$x := …`` or ``$x = …``; return False when it is neither."""
    if len(words) < 3 or words[0][0] != "variable" or words[1] not in (("mark", ":="), ("mark", "=")):
        return False
    name, value = words[0][1], _evaluate(words[2:], scope)
    target = scope if words[1][1] == ":=" else scope.defining(name)
    target.variables[name] = value
    return True


def _write_loop(node: TemplateNode, scope: _TemplateScope, output: list[str]) -> None:
    names: list[str] = []
    words = node.words
    if ("mark", ":=") in words:
        mark = words.index(("mark", ":="))
        names = [text for kind, text in words[:mark] if kind == "variable"]
        words = words[mark + 1 :]
    items = _items(_evaluate(words, scope))
    if not items:
        _write(node.otherwise, scope.inner(scope.dot), output)
    for key, item in items:
        inner = scope.inner(item)
        values = [key, item] if len(names) == 2 else [item]
        inner.variables |= dict(zip(names, values, strict=False))
        try:
            _write(node.body, inner, output)
        except _Jump as jump:
            if jump.ends_loop:
                break


def _items(value: object) -> list[tuple[object, object]]:
    """What a loop runs over, with the index or key of each; Go sorts the keys of a map."""
    if value is None or isinstance(value, list):
        return list(enumerate(value or []))
    if isinstance(value, GoObject) and value.is_map:
        return [(name, value.fields[name]) for name in sorted(value.fields)]
    refuse("range over something that is not a list")


def _is_true(value: object) -> bool:
    """Whether Go takes a value for true: structs always are."""
    return bool(value.fields) or not value.is_map if isinstance(value, GoObject) else bool(value)


def _printed(value: object) -> str:
    try:
        return print_value(value)
    except TypeError as error:
        refuse(str(error))


# ---------------------------------------------------------------- expressions


def _evaluate(words: list[Word], scope: _TemplateScope) -> object:
    """The value of a pipeline of one command."""
    value, rest = _command(words, scope)
    if rest:
        refuse(f"{rest[0][1]!r} is not supported here")
    return value


def _command(words: list[Word], scope: _TemplateScope) -> tuple[object, list[Word]]:
    """The value of the command that the words begin with, and the words after it."""
    if not words:
        refuse("an empty action")
    kind, text = words[0]
    if kind != "name" or text in ("true", "false", "nil"):
        return _operand(words, scope)
    if text not in _FUNCTIONS:
        refuse(f"{text} is not supported")
    arguments, rest = [], words[1:]
    while rest and rest[0] != ("mark", ")"):
        value, rest = _operand(rest, scope)
        arguments.append(value)
    try:
        return _FUNCTIONS[text](*arguments), rest
    except (TypeError, IndexError, KeyError) as error:
        refuse(f"{text} can't be called like that ({error})")


def _operand(words: list[Word], scope: _TemplateScope) -> tuple[object, list[Word]]:
    (kind, text), rest = words[0], words[1:]
    value: object
    if kind == "text":
        value = _unquote(text)
    elif kind == "number":
        value = int(text)
    elif kind == "variable":
        value = scope.defining(text).variables[text]
    elif kind == "field":
        value = scope.dot if text == "." else _field(scope.dot, text)
    elif (kind, text) == ("mark", "("):
        value, rest = _command(rest, scope)
        if not rest or rest[0] != ("mark", ")"):
            refuse("a bracket is not closed")
        rest = rest[1:]
    elif text in ("true", "false", "nil"):
        value = {"true": True, "false": False, "nil": None}[text]
    else:
        refuse(f"{text!r} is not supported here")
    while rest and rest[0][0] == "of":
        value, rest = _field(value, rest[0][1]), rest[1:]
    return value, rest


def _field(value: object, text: str) -> object:
    if not isinstance(value, GoObject) or text[1:] not in value.fields:
        refuse(f"{text} does not exist")
    return value.fields[text[1:]]


def _unquote(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1].replace("\r", "")

    def character(match: re.Match[str]) -> str:
        number = match[1] or match[2] or match[3]
        if number or match[4]:
            return chr(int(number, 16) if number else int(match[4], 8))
        return _ESCAPED.get(match[5], match[5])

    return _ESCAPE.sub(character, text[1:-1])


# ---------------------------------------------------------------- functions


def _compare(one: object, other: object) -> int:
    """-1, 0 or 1, as `one` is less than, equal to or greater than `other`."""
    if isinstance(one, int) and isinstance(other, int):
        return (one > other) - (one < other)
    if isinstance(one, str) and isinstance(other, str):
        return (one > other) - (one < other)
    raise TypeError("only numbers or only texts can be compared")


def _sequence(value: object) -> Sequence[object]:
    if not isinstance(value, str | list):
        raise TypeError("neither a list nor a text")
    return value


def _slice(value: object, start: int = 0, end: int | None = None) -> object:
    items = _sequence(value)
    if end is None:
        end = len(items)
    if not 0 <= start <= end <= len(items):
        raise IndexError("slice")
    return items[start:end]


def _index(value: object, *keys: object) -> object:
    for key in keys:
        if isinstance(value, GoObject) and value.is_map and isinstance(key, str):
            value = value.fields[key]
        elif isinstance(key, int):
            items = _sequence(value)
            if isinstance(value, list) and not 0 <= key < len(items):
                raise IndexError("index")
            value = items[key]
        else:
            raise TypeError("index")
    return value


def _length(value: object) -> int:
    if isinstance(value, str):
        return len(value.encode())
    return len(value.fields) if isinstance(value, GoObject) and value.is_map else len(_sequence(value))


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "eq": lambda one, *values: any(one == value for value in values),
    "ne": lambda one, other: one != other,
    "lt": lambda one, other: _compare(one, other) < 0,
    "le": lambda one, other: _compare(one, other) <= 0,
    "gt": lambda one, other: _compare(one, other) > 0,
    "ge": lambda one, other: _compare(one, other) >= 0,
    "and": lambda *values: next((value for value in values if not _is_true(value)), values[-1]),
    "or": lambda *values: next((value for value in values if _is_true(value)), values[-1]),
    "not": lambda value: not _is_true(value),
    "json": json_of,
    "len": _length,
    "index": _index,
    "slice": _slice,
    "print": lambda *values: "".join(map(print_value, values)),
}
