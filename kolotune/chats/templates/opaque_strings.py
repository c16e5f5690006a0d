"""A template's writing of texts that it can't look into: whether it does no more with them than to pass them on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Environment, Template, nodes

Around = tuple[list[str], list[tuple[int, bool]]]
_Part = str | tuple[int, bool]  # a text of the template's, or the number of one that is unseen, and whether trimmed

_MARK = chr(0x100000)
_MARKED = re.compile(f"{_MARK}(\\d+)(t?){_MARK}")
_ASKING = (
    "eq", "ne", "lt", "le", "gt", "ge", "len", "iter", "reversed", "contains", "getitem", "hash", "int", "float",
    "index", "str", "repr", "format", "mod", "rmod", "mul", "rmul",
)  # fmt: skip
# Statements whose output the template itself can take up and look into, or writes otherwise.
_CAPTURING = (
    nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.EvalContextModifier,
)  # fmt: skip


def around(environment: Environment, jinja: str, roles: Sequence[str], options: Mapping[str, Any]) -> Around | None:
    """What a template writes around the texts of turns with these roles, whatever they are, as long as none is blank.

    Args:
        environment: Jinja's, in which the template is run with real texts.
        jinja: the template's source.
        roles: who speaks.
        options: the template's other variables.

    Returns:
        What stands before, between and behind the texts; and for each place between, the number of the text and whether
        it is trimmed. None when the template looks into a text, or does with one what is not known here.

    Raises:
        Exception: the template's own.
    """
    blind = _blind(environment, jinja)
    if blind is None:
        return None
    looked: list[str] = []
    messages = [{"role": role, "content": _Unseen(looked, ((number, False),))} for number, role in enumerate(roles)]
    try:
        text = blind.render(messages=messages, **options)
    except Exception:
        if looked:
            return None
        raise
    found = _MARKED.split(text)
    places = [(int(number), bool(trimmed)) for number, trimmed in zip(found[1::3], found[2::3], strict=True)]
    return None if looked else (found[::3], places)


class _Looked(Exception):
    """A template looked into a text."""


class _Unseen:
    """A text, or texts joined, of which nothing can be seen. Who tries is noted: templates pass over errors."""

    __slots__ = ("_looked", "_parts")

    def __init__(self, looked: list[str], parts: tuple[_Part, ...]) -> None:
        self._looked, self._parts = looked, parts

    def __add__(self, other: Any) -> _Unseen:
        return self._joined(self._parts, _parts_of(other))

    def __radd__(self, other: Any) -> _Unseen:
        return self._joined(_parts_of(other), self._parts)

    def _joined(self, *both: tuple[_Part, ...] | None) -> _Unseen:
        if None in both:
            self._refuse("add")
        return _Unseen(self._looked, tuple(part for parts in both for part in parts or ()))

    def __bool__(self) -> bool:
        return True  # none of them is blank

    def strip(self, *characters: Any) -> _Unseen:
        """The text without white space at its ends."""
        if characters or len(self._parts) != 1 or isinstance(self._parts[0], str):
            self._refuse("strip")
        return _Unseen(self._looked, ((self._parts[0][0], True),))

    def __getattr__(self, name: str) -> NoReturn:
        self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        self._looked.append(name)
        raise _Looked(name)

    def _marked(self) -> str:
        return "".join(
            part if isinstance(part, str) else f"{_MARK}{part[0]}{'t' * part[1]}{_MARK}" for part in self._parts
        )


def _refusal(name: str) -> Callable[..., NoReturn]:
    return lambda unseen, *_: unseen._refuse(name)


for _name in _ASKING:
    setattr(_Unseen, f"__{_name}__", _refusal(_name))


def _parts_of(value: Any) -> tuple[_Part, ...] | None:
    if type(value) is str:
        return (value,)
    return value._parts if type(value) is _Unseen else None


@lru_cache(8)
def _blind(environment: Environment, jinja: str) -> Template | None:
    """The template compiled so that it can write unseen texts; None when it may read what it wrote."""
    if _MARK in jinja or any(environment.parse(jinja).find_all(_CAPTURING)):
        return None
    kinds = {name: _also(environment.tests[name]) for name in ("string", "iterable", "sequence")}
    trim = environment.filters["trim"]

    def trimmed(value: Any, *characters: Any) -> Any:
        return value.strip(*characters) if type(value) is _Unseen else trim(value, *characters)

    blind = environment.overlay(finalize=lambda value: value._marked() if type(value) is _Unseen else value)
    blind.tests = {**environment.tests, **kinds}
    blind.filters = {**environment.filters, "trim": trimmed}
    return blind.from_string(jinja)


def _also(test: Any) -> Callable[[Any], Any]:
    """A test that asks of what kind a value is: that says nothing about a text."""
    return lambda value: type(value) is _Unseen or test(value)
