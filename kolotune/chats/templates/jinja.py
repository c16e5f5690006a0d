"""Render chat templates with Jinja as transformers does, without transformers; where llama.cpp differs, as it does.

llama.cpp is what serves the result. docs/chat-templates.md lists the differences.

The code here runs strangers' programs. Other modules call it through `sandbox`, which runs it in a confined process
and keeps each call within limits of time, memory and length.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from jinja2 import Template, ext, nodes, sandbox
from jinja2 import exceptions as jinja_errors
from jinja2.parser import Parser
from jinja2.utils import Namespace

from kolotune.foundation.errors import TemplateError
from kolotune.runners import limits

from . import free_variables as analysis
from .opaque_strings import find_signature
from .signature import TemplateSignature

Result = TypeVar("Result")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # its names in templates, the best known first
_CHANGING = ("append", "pop")  # what llama.cpp's lists have, too
_TOO_LARGE = "the chat template can't be used: it writes far more text than it is given"
# The longest rendering, in characters: this many, and this many for each character of the chat.
_FREE, _FACTOR = 1 << 20, 16


def uses_of_date(jinja: str) -> int:
    """See `sandbox.uses_of_date`."""

    def count() -> int:
        tree = _compiled(jinja).environment.parse(jinja)
        return sum(name.name == "strftime_now" for name in tree.find_all(nodes.Name))

    return _limited(count, "is not valid Jinja")


def free_variables(jinja: str) -> list[str]:
    """See `sandbox.free_variables`."""

    def names() -> list[str]:
        environment = _compiled(jinja).environment
        found = analysis.free_variables(environment.parse(jinja))
        return sorted(found - environment.globals.keys())

    return _limited(names, "is not valid Jinja")


def inspects(jinja: str, name: str) -> bool:
    """See `sandbox.inspects`."""
    return _limited(lambda: analysis.inspects(_compiled(jinja).environment.parse(jinja), name), "is not valid Jinja")


def extends(jinja: str, inner: str, names: Sequence[str]) -> bool:
    """See `sandbox.extends`."""

    def result() -> bool:
        environment = _compiled(jinja).environment
        first, rest = (body := environment.parse(jinja).body)[: len(names)], body[len(names) :]
        targets = [node.target for node in first if isinstance(node, nodes.Assign)]
        return rest == environment.parse(inner).body and targets == [nodes.Name(name, "store") for name in names]

    return _limited(result, "is not valid Jinja")


def render(
    jinja: str,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None,
    variables: Mapping[str, object],
) -> str:
    """See `sandbox.render`."""

    def text() -> str:
        turns, offered = [_with_reasoning(message) for message in messages], tools or None
        if any(name in jinja for name in _CHANGING):
            turns, offered = copy.deepcopy((turns, offered))  # these lists are the caller's
        return str(_compiled(jinja).render(messages=turns, tools=offered, documents=None, **variables))

    rendered = _limited(text, "refuses these messages")
    if len(rendered) > _FREE:
        chat_length = len(json.dumps([messages, tools], ensure_ascii=False))
        if len(rendered) > _FREE + _FACTOR * chat_length:
            raise TemplateError(_TOO_LARGE)
    return rendered


def signature(jinja: str, roles: Sequence[str], variables: Mapping[str, object]) -> TemplateSignature | None:
    """See `sandbox.signature`."""
    result = _limited(
        lambda: find_signature(_compiled(jinja).environment, jinja, roles, variables), "refuses these messages"
    )
    if result is not None and sum(map(len, result.pieces)) > _FREE:
        raise TemplateError(_TOO_LARGE)
    return result


def _limited(work: Callable[[], Result], failure: str) -> Result:
    try:
        return limits.call(work)
    except limits.LimitExceeded as error:
        raise TemplateError(f"the chat template can't be used: {error}") from None
    except Exception as error:  # a stranger's program: whatever it raises is its own failure
        raise TemplateError(f"the chat template {failure}: {_describe(error)}") from None


@lru_cache(64)
def _compiled(jinja: str) -> Template:
    environment = _TemplateEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols], finalize=_written
    )
    environment.filters |= {"tojson": _to_json, "safe": str}
    environment.globals |= {
        "raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    return environment.from_string(jinja)


class _TemplateEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which lists can grow and shrink: templates collect tool calls in them."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return (attr in _CHANGING and isinstance(obj, list)) or super().is_safe_attribute(obj, attr, value)


def _written(value: object) -> object:
    """Return what is written for a value: for none nothing."""
    return "" if value is None else value


class _Generation(ext.Extension):
    """``{% generation %}``, with which templates mark what the assistant says; its content is rendered as is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own name for it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's namespace without names that start with an underscore, as Python's own do."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *rest = args
        values = dict(*rest, **named)
        for name in values:
            _check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check(name)
        super().__setitem__(name, value)


class _Dict:
    """``dict`` as templates call it; the type itself would lead to other types."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check(name: object) -> None:
    if str(name).startswith("_"):
        raise jinja_errors.SecurityError(f"a namespace can't have the name {name!r}")


def _raise(message: str) -> NoReturn:
    raise jinja_errors.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write plain JSON; Jinja's own filter escapes for HTML."""
    return json.dumps(
        value,
        default=_listed,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _listed(value: object) -> list[object]:
    """Return what filters such as ``map`` yield as a list."""
    if isinstance(value, Generator):
        return list(value)
    raise TypeError(f"{type(value).__name__} can't be written as JSON")


def _with_reasoning(message: Mapping[str, object]) -> Mapping[str, object]:
    """Return the message with its reasoning under every name that templates look for."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _describe(error: Exception) -> str:
    """Return an error's message on one line; with its type only where the message needs it."""
    message = " ".join(str(error).split())
    if isinstance(error, jinja_errors.TemplateSyntaxError):
        return f"{' '.join((error.message or '').split())} (line {error.lineno})"
    if isinstance(error, jinja_errors.UndefinedError) and message.endswith("no attribute 'undefined'"):
        return "it needs a variable that is no part of a chat; those that it has are set in its first lines"
    if isinstance(error, jinja_errors.TemplateError) and message:
        return message
    return f"{type(error).__name__}: {message}"
