"""Renders a Go template as Ollama does, from its text: the part of the language that Modelfiles of chats use.

What stands in a Modelfile is read, not what kolotune would have written there. A template that uses more of the
language than is known here is refused, never guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from kolotune.foundation.errors import ArtifactError

from .turn_format import merge

_ACTION = re.compile(
    r"\{\{(?P<left>-(?=\s))?(?P<code>(?:\"(?:[^\"\\\n]|\\.)*\"|`[^`]*`|[^\"`])*?)(?P<right>(?<=\s)-)?\}\}"
)
_WORD = re.compile(
    r"""\s*(?:
      (?P<text>"(?:[^"\\\n]|\\.)*"|`[^`]*`)
    | (?P<number>-?\d+)
    | (?P<variable>\$\w*)
    | (?P<field>\.\w+|\.(?!\w))
    | (?P<name>[A-Za-z_]\w*)
    | (?P<mark>:=|[=(),|])
    )(?P<space>\s*)""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
# What Ollama has besides, as it is in a plain conversation.
_NO_TOOLS: dict[str, Any] = {"Thinking": "", "Images": [], "ToolCalls": [], "ToolName": "", "ToolCallID": ""}
_NO_THINKING: dict[str, Any] = {"Tools": [], "Think": False, "ThinkLevel": "", "IsThinkSet": False}
_KEYWORDS = ("if", "else", "end", "range", "with", "break", "continue", "define", "block", "template")


def render(template: str, messages: Sequence[Mapping[str, Any]], system: str | None = None) -> str:
    """The prompt that Ollama makes of a conversation.

    Args:
        template: the text of TEMPLATE; it has to loop over the messages.
        messages: turns with `role` and `content`. Neighbours of one role are merged, as Ollama does.
        system: of the Modelfile; it stands before a conversation that brings none.

    Raises:
        ArtifactError: the template is none, or uses what is not known here.
    """
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    turns = [{"Role": each["role"], "Content": each["content"], **_NO_TOOLS} for each in merge(messages)]
    systems = "\n\n".join(each["content"] for each in messages if each["role"] == "system")
    if ".Messages" not in template:
        _refuse("it does not loop over .Messages")
    data = {"System": systems, "Messages": turns, "Response": "", **_NO_THINKING}
    out: list[str] = []
    scope = _TemplateScope(data, {"$": data})
    _write(_parsed(template), scope, out)
    return "".join(out)


def _refuse(reason: str) -> NoReturn:
    raise ArtifactError(f"TEMPLATE: {reason}", "Write the Modelfile anew with `kolotune modelfile`.")


@dataclass
class _TemplateNode:
    """Text, an action, or a block: its head's words, what it holds, and what stands behind its else."""

    kind: str
    text: str = ""
    words: list[tuple[str, str]] = field(default_factory=list)
    body: list[_TemplateNode] = field(default_factory=list)
    otherwise: list[_TemplateNode] = field(default_factory=list)


@dataclass
class _TemplateScope:
    """The dot, and the variables that can be seen: those of the blocks around come first."""

    dot: Any
    variables: dict[str, Any]
    outer: _TemplateScope | None = None

    def inside(self, dot: Any) -> _TemplateScope:
        return _TemplateScope(dot, {}, self)

    def home(self, name: str) -> _TemplateScope:
        scope: _TemplateScope | None = self
        while scope is not None:
            if name in scope.variables:
                return scope
            scope = scope.outer
        _refuse(f"{name} is not defined")


# ---------------------------------------------------------------- reading


def _parsed(template: str) -> list[_TemplateNode]:
    """The template as a tree."""
    root = _TemplateNode("root")
    open_blocks: list[tuple[_TemplateNode, list[_TemplateNode]]] = [(root, root.body)]
    at, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[at : found.start()]
        if "{{" in text:
            _refuse("an action is not closed")
        text = text.lstrip(" \t\r\n") if trim else text
        open_blocks[-1][1].append(_TemplateNode("text", text.rstrip(" \t\r\n") if found["left"] else text))
        _take(found["code"].strip(), open_blocks)
        at, trim = found.end(), bool(found["right"])
    rest = template[at:]
    if "{{" in rest or len(open_blocks) > 1:
        _refuse("an action or a block is not closed")
    root.body.append(_TemplateNode("text", rest.lstrip(" \t\r\n") if trim else rest))
    return root.body


def _take(code: str, open_blocks: list[tuple[_TemplateNode, list[_TemplateNode]]]) -> None:
    """Puts one action into the tree."""
    if code.startswith("/*") and code.endswith("*/"):
        return
    head, _, rest = code.partition(" ")
    block, place = open_blocks[-1]
    if head in ("if", "range"):
        node = _TemplateNode(head, words=_words(rest))
        place.append(node)
        open_blocks.append((node, node.body))
    elif code == "end":
        if block.kind == "root":
            _refuse("an end without a block")
        # `else if` opened a block inside the else of the one before; one end closes them all.
        while open_blocks.pop()[0].text == "chained":
            pass
    elif head == "else":
        if block.kind not in ("if", "range") or place is block.otherwise:
            _refuse("an else without an if")
        open_blocks[-1] = (block, block.otherwise)
        if rest.strip():
            word, _, condition = rest.strip().partition(" ")
            if word != "if" or block.kind != "if":
                _refuse(f"else {word} is not known")
            node = _TemplateNode("if", "chained", _words(condition))
            block.otherwise.append(node)
            open_blocks.append((node, node.body))
    elif head in _KEYWORDS:
        _refuse(f"{head} is not known")
    else:
        place.append(_TemplateNode("action", words=_words(code)))


def _words(code: str) -> list[tuple[str, str]]:
    """The words of an action: (kind, text); a field that follows without a space belongs to what stands before."""
    found: list[tuple[str, str]] = []
    at, glued = 0, False
    code = code.strip()
    while at < len(code):
        match = _WORD.match(code, at)
        if match is None:
            _refuse(f"{code[at : at + 20]!r} is not known")
        kind = str(
            match.lastgroup if match.lastgroup != "space" else next(k for k, v in match.groupdict().items() if v)
        )
        text = str(match[kind])
        if kind == "field" and glued and not match[0][:1].isspace():
            kind = "of"
        if kind == "mark" and text == ")":
            glued = not match["space"]
        else:
            glued = kind in ("variable", "field", "of") and not match["space"]
        found.append((kind, text))
        at = match.end()
    return found


# ---------------------------------------------------------------- writing


def _write(nodes: Sequence[_TemplateNode], scope: _TemplateScope, out: list[str]) -> None:
    for node in nodes:
        if node.kind == "text":
            out.append(node.text)
        elif node.kind == "action":
            if not _assigned(node.words, scope):
                out.append(_shown(_value(node.words, scope)))
        elif node.kind == "if":
            chosen = node.body if _true(_value(node.words, scope)) else node.otherwise
            _write(chosen, scope.inside(scope.dot), out)
        else:
            _loop(node, scope, out)


def _assigned(words: list[tuple[str, str]], scope: _TemplateScope) -> bool:
    """Carries out ``$x := …`` and ``$x = …``; False when it is neither."""
    if len(words) < 3 or words[0][0] != "variable" or words[1] not in (("mark", ":="), ("mark", "=")):
        return False
    name, value = words[0][1], _value(words[2:], scope)
    (scope if words[1][1] == ":=" else scope.home(name)).variables[name] = value
    return True


def _loop(node: _TemplateNode, scope: _TemplateScope, out: list[str]) -> None:
    names: list[str] = []
    words = node.words
    if ("mark", ":=") in words:
        at = words.index(("mark", ":="))
        names = [text for kind, text in words[:at] if kind == "variable"]
        words = words[at + 1 :]
    items = _value(words, scope)
    if not isinstance(items, list):
        _refuse("range over something that is no list")
    if not items:
        _write(node.otherwise, scope.inside(scope.dot), out)
    for index, item in enumerate(items):
        inner = scope.inside(item)
        values = [index, item] if len(names) == 2 else [item]
        inner.variables |= dict(zip(names, values, strict=False))
        _write(node.body, inner, out)


def _value(words: list[tuple[str, str]], scope: _TemplateScope) -> Any:
    """The value of a pipeline of one command."""
    value, rest = _command(words, scope)
    if rest:
        _refuse(f"{rest[0][1]!r} is not known here")
    return value


def _command(words: list[tuple[str, str]], scope: _TemplateScope) -> tuple[Any, list[tuple[str, str]]]:
    if not words:
        _refuse("an empty action")
    kind, text = words[0]
    if kind != "name" or text in ("true", "false", "nil"):
        return _operand(words, scope)
    if text not in _FUNCTIONS:
        _refuse(f"{text} is not known")
    arguments, rest = [], words[1:]
    while rest and rest[0] != ("mark", ")"):
        value, rest = _operand(rest, scope)
        arguments.append(value)
    try:
        return _FUNCTIONS[text](*arguments), rest
    except (TypeError, IndexError, KeyError) as error:
        _refuse(f"{text} can't be called like that ({error})")


def _operand(words: list[tuple[str, str]], scope: _TemplateScope) -> tuple[Any, list[tuple[str, str]]]:
    (kind, text), rest = words[0], words[1:]
    value: Any
    if kind == "text":
        value = _unquoted(text)
    elif kind == "number":
        value = int(text)
    elif kind == "variable":
        value = scope.home(text).variables[text]
    elif kind == "field":
        value = scope.dot if text == "." else _field(scope.dot, text)
    elif (kind, text) == ("mark", "("):
        value, rest = _command(rest, scope)
        if not rest or rest[0] != ("mark", ")"):
            _refuse("a bracket is not closed")
        rest = rest[1:]
    elif text in ("true", "false", "nil"):
        value = {"true": True, "false": False, "nil": None}[text]
    else:
        _refuse(f"{text!r} is not known here")
    while rest and rest[0][0] == "of":
        value, rest = _field(value, rest[0][1]), rest[1:]
    return value, rest


def _field(value: Any, text: str) -> Any:
    if not isinstance(value, dict) or text[1:] not in value:
        _refuse(f"{text} is not known")
    return value[text[1:]]


def _unquoted(text: str) -> str:
    if text.startswith("`"):
        return text[1:-1].replace("\r", "")

    def plain(match: re.Match[str]) -> str:
        number = match[1] or match[2] or match[3]
        if number or match[4]:
            return chr(int(number, 16) if number else int(match[4], 8))
        return _ESCAPED.get(match[5], match[5])

    return _ESCAPE.sub(plain, text[1:-1])


def _true(value: Any) -> bool:
    return bool(value)


def _shown(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _slice(items: Any, start: int = 0, end: int | None = None) -> Any:
    if end is None:
        end = len(items)
    if not 0 <= start <= end <= len(items):
        raise IndexError("slice")
    return items[start:end]


def _index(items: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(items, list) and not 0 <= key < len(items):
            raise IndexError("index")
        items = items[key]
    return items


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda one, *others: any(one == each for each in others),
    "ne": lambda one, other: one != other,
    "lt": lambda one, other: one < other,
    "le": lambda one, other: one <= other,
    "gt": lambda one, other: one > other,
    "ge": lambda one, other: one >= other,
    "and": lambda *values: next((each for each in values if not each), values[-1]),
    "or": lambda *values: next((each for each in values if each), values[-1]),
    "not": lambda value: not value,
    "len": lambda value: len(value.encode()) if isinstance(value, str) else len(value),
    "index": _index,
    "slice": _slice,
    "print": lambda *values: "".join(map(_shown, values)),
}
