"""Jinja as chat templates are written for it: the environment that transformers gives them, made without it.

What stands here runs strangers' programs. It is called through `renderer`, in processes that are confined, and each
call keeps within limits of time, memory and length.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

from jinja2 import exceptions as faults
from jinja2 import ext, nodes, sandbox
from jinja2.parser import Parser
from jinja2.utils import Namespace

from kolotune.foundation.errors import TemplateError
from kolotune.runners import limits

from . import opaque_strings
from .opaque_strings import Around

Result = TypeVar("Result")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # its names in templates, the best known first
_TOO_LARGE = "the chat template can't be used: it writes very much more than it is given"
_FREE, _TIMES = 1 << 20, 16  # a rendering has at most so many characters, and so many for each of its chat's


def uses_of_date(jinja: str) -> int:
    """How often ``strftime_now`` stands in an expression of the template.

    Raises:
        TemplateError: it is not valid Jinja, or takes too much to be read.
    """

    def count() -> int:
        tree = _compiled(jinja).environment.parse(jinja)
        return sum(name.name == "strftime_now" for name in tree.find_all(nodes.Name))

    return _limited(count, "is not valid Jinja")


def render(jinja: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, more: dict[str, Any]) -> str:
    """The text of a chat; `more` are the template's other variables.

    Raises:
        TemplateError: the template fails on these messages, or takes too much.
    """

    def text() -> str:
        given = [_with_reasoning(message) for message in messages]
        return str(_compiled(jinja).render(messages=given, tools=tools or None, documents=None, **more))

    found = _limited(text, "refuses these messages")
    if len(found) > _FREE and len(found) > _FREE + _TIMES * len(json.dumps([messages, tools], ensure_ascii=False)):
        raise TemplateError(_TOO_LARGE)
    return found


def around(jinja: str, roles: list[str], options: dict[str, Any]) -> Around | None:
    """What the template writes around the texts of turns with these roles; see `unseen.around`.

    Raises:
        TemplateError: the template fails on these turns, or takes too much.
    """

    def pieces() -> Around | None:
        return opaque_strings.around(_compiled(jinja).environment, jinja, roles, options)

    found = _limited(pieces, "refuses these messages")
    if found is not None and sum(map(len, found[0])) > _FREE:
        raise TemplateError(_TOO_LARGE)
    return found


def _limited(work: Callable[[], Result], fault: str) -> Result:
    try:
        return limits.call(work)
    except limits.LimitExceeded as error:
        raise TemplateError(f"the chat template can't be used: {error}") from None
    except Exception as error:  # it is a stranger's program: whatever it raises is its own failure
        raise TemplateError(f"the chat template {fault}: {_words(error)}") from None


@lru_cache(64)
def _compiled(jinja: str) -> Any:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    return environment.from_string(jinja)


class _Generation(ext.Extension):
    """``{% generation %}``, with which templates mark what the assistant says: here its content as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own name for it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore: Python's own begin so."""

    def __init__(*args: Any, **named: Any) -> None:
        self, *rest = args
        found = dict(*rest, **named)
        for name in found:
            _check(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


class _Dict:
    """``dict`` as templates call it; the type itself would lead on to other types."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check(name: Any) -> None:
    if str(name).startswith("_"):
        raise faults.SecurityError(f"a namespace can't have the name {name!r}")


def _raise(message: str) -> NoReturn:
    raise faults.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as it is, where Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with what the assistant thought under the names that templates look for."""
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought} | message | {"reasoning_content": thought}


def _words(error: Exception) -> str:
    """An error's message on one line; the type only where the message does not stand on its own."""
    message = " ".join(str(error).split())
    if isinstance(error, faults.TemplateSyntaxError):
        return f"{' '.join((error.message or '').split())} (line {error.lineno})"
    if isinstance(error, faults.TemplateError) and message:
        return message
    return f"{type(error).__name__}: {message}"
