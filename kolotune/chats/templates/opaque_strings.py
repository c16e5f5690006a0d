"""Find a template's signature by rendering it with texts that it can't inspect.

An `OpaqueText` can be written, joined to other text and trimmed; anything else that a template does with it raises an
error and is recorded. A template that renders without such an attempt writes the same around every text.

Example: ``{{ message.content }}`` passes; ``{% if 'x' in message.content %}`` does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, Template, nodes

from .signature import TemplateSignature

_Part = (
    str | tuple[int, bool]
)  # text that the template wrote, or the number of an opaque text and whether it is trimmed

_MARK = chr(0x100000)
_MARKED = re.compile(f"{_MARK}(\\d+)(t?){_MARK}")
_REFUSED_METHODS = (
    "eq", "ne", "lt", "le", "gt", "ge", "len", "iter", "reversed", "contains", "getitem", "hash", "int", "float",
    "index", "str", "repr", "format", "mod", "rmod", "mul", "rmul",
)  # fmt: skip
# Statements whose output the template can capture and inspect, or writes in some other way.
_CAPTURING = (
    nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.EvalContextModifier,
)  # fmt: skip


def find_signature(
    environment: Environment, jinja: str, roles: Sequence[str], options: Mapping[str, object]
) -> TemplateSignature | None:
    """Return what a template writes around the texts of turns with these roles, provided that no text is blank.

    Args:
        environment: The environment in which the template renders real texts.
        jinja, roles, options: As in `sandbox.signature`.

    Returns:
        The signature; None if the template inspects a text, or does something unknown with it.

    Raises:
        Exception: Whatever the template raises.
    """
    template = _compiled(environment, jinja)
    if template is None:
        return None
    attempts: list[str] = []
    messages = [
        {"role": role, "content": OpaqueText(attempts, ((number, False),))} for number, role in enumerate(roles)
    ]
    try:
        text = template.render(messages=messages, **options)
    except Exception:
        if attempts:
            return None
        raise
    parts = _MARKED.split(text)
    contents = [(int(number), bool(trimmed)) for number, trimmed in zip(parts[1::3], parts[2::3], strict=True)]
    return None if attempts else TemplateSignature(parts[::3], contents)


class _Inspected(Exception):
    """A template inspected a text."""


class OpaqueText:
    """One text, or several joined, that can't be inspected.

    Args:
        attempts: Receives the name of each refused operation; templates can swallow errors.
        parts: What it consists of.
    """

    __slots__ = ("_attempts", "_parts")

    def __init__(self, attempts: list[str], parts: tuple[_Part, ...]) -> None:
        self._attempts, self._parts = attempts, parts

    def __add__(self, other: object) -> OpaqueText:
        return self._joined(self._parts, _parts_of(other))

    def __radd__(self, other: object) -> OpaqueText:
        return self._joined(_parts_of(other), self._parts)

    def _joined(self, *both: tuple[_Part, ...] | None) -> OpaqueText:
        if None in both:
            self._refuse("add")
        return OpaqueText(self._attempts, tuple(part for parts in both for part in parts or ()))

    def __bool__(self) -> bool:
        return True  # none is blank

    def strip(self, *characters: object) -> OpaqueText:
        """Return the text without white space at its ends."""
        if characters or len(self._parts) != 1 or isinstance(self._parts[0], str):
            self._refuse("strip")
        return OpaqueText(self._attempts, ((self._parts[0][0], True),))

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        self._attempts.append(name)
        raise _Inspected(name)

    def _marked(self) -> str:
        return "".join(
            part if isinstance(part, str) else f"{_MARK}{part[0]}{'t' * part[1]}{_MARK}" for part in self._parts
        )


def _refusing(name: str) -> Callable[..., NoReturn]:
    return lambda text, *_: text._refuse(name)


for _name in _REFUSED_METHODS:
    setattr(OpaqueText, f"__{_name}__", _refusing(_name))


def _parts_of(value: object) -> tuple[_Part, ...] | None:
    if type(value) is str:
        return (value,)
    return value._parts if type(value) is OpaqueText else None


@lru_cache(8)
def _compiled(environment: Environment, jinja: str) -> Template | None:
    """Compile a template so that it can write opaque texts; None if it may read what it writes."""
    if _MARK in jinja or any(environment.parse(jinja).find_all(_CAPTURING)):
        return None
    tests = {name: _or_opaque(environment.tests[name]) for name in ("string", "iterable", "sequence")}
    trim = environment.filters["trim"]

    def trimmed(value: Any, *characters: Any) -> Any:
        return value.strip(*characters) if type(value) is OpaqueText else trim(value, *characters)

    overlay = environment.overlay(finalize=lambda value: value._marked() if type(value) is OpaqueText else value)
    overlay.tests = {**environment.tests, **tests}
    overlay.filters = {**environment.filters, "trim": trimmed}
    return overlay.from_string(jinja)


def _or_opaque(test: Any) -> Callable[[object], Any]:
    """Return a test of a value's type, which reveals nothing about an opaque text."""
    return lambda value: type(value) is OpaqueText or test(value)
