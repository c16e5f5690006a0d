"""Bind every variable of a template that servers know and training does not, so that it renders one way.

Servers hand templates more than a chat: today's date, ``enable_thinking``, whatever a client puts into
``chat_template_kwargs``. Training has none of it. So the template that is trained with, stored and served starts with
lines that give each such variable the value that it has in training.

Example: a template that says ``{% if enable_thinking %}`` gets ``{% set enable_thinking = {}.undefined %}`` before
its first line, which is undefined in Jinja2 and in llama.cpp's engine, and writes nothing.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Collection, Mapping

from kolotune.foundation.errors import ConfigError, TemplateError

from . import sandbox
from .frozen_date import format_date, freeze_date

# What a chat is: every server hands these, with the same values.
_OF_THE_CHAT = frozenset(("messages", "tools", "add_generation_prompt"))
# Servers hand the tokens that a GGUF names; transformers hands all that a tokenizer has.
_SERVED_TOKENS = ("bos_token", "eos_token")
_SWITCH = "true if {name} else false"  # so that a server that says nothing gets what answers without thoughts got
_UNDEFINED = "{}.undefined"  # an item that an empty mapping does not have
# Where a chat has no tools, transformers hands none, llama.cpp nothing, and others an empty list. Templates are written
# for none, except those that loop over the tools of each chat.
_NO_TOOLS = ("none", _UNDEFINED)
_LINE = re.compile(r"\{% set (?P<name>\w+) = (?P<value>.*) %\}\n")
_DATES = {"datetime": "%b %d %Y", "date_string": "%d %b %Y"}  # as llama.cpp writes them
_QUESTION = ({"role": "user", "content": "Hi"},)


def bind(jinja: str, date: datetime.date, tokens: Mapping[str, object], switches: Collection[str] = ()) -> str:
    """Return the template with today's date and all variables bound to what training has.

    Args:
        jinja: The source of the template.
        date: What the template is to show as today's date; see `freeze_date`.
        tokens: The special tokens that the tokenizer has, by the names that templates use.
        switches: Variables that stay free, as true or false: the model is trained with both.

    Returns:
        The source behind lines that set the variables; the same text if there is nothing to bind.

    Raises:
        ConfigError: The template has no variable with a switch's name.
        TemplateError: The template is not valid Jinja, or can't be bound.
    """
    frozen = freeze_date(jinja, date)
    free = [name for name in sandbox.free_variables(frozen) if name not in _OF_THE_CHAT]
    unbound = {name for name in _SERVED_TOKENS if name in tokens}
    _check_switches(switches, [name for name in free if name not in (*tokens, *_SERVED_TOKENS)])
    switched = {name: _SWITCH.format(name=name) for name in switches if name not in switches_of(frozen)}
    values = {name: _value(name, tokens) for name in free if name not in unbound and name not in switches} | switched
    values = _with_required(values, frozen, date, tokens)
    values |= _value_of_tools(values, frozen, tokens)
    if not values:
        return frozen
    bound = _with_values(values, frozen)
    left = set(sandbox.free_variables(bound)) - _OF_THE_CHAT - unbound - set(switches)
    if left or not sandbox.extends(bound, frozen, list(values)):
        raise TemplateError(
            "the chat template uses variables in a way that can't be fixed to their values in training",
            f"Write a value for {', '.join(sorted(left or values))} into the template, or choose another base model.",
        )
    return bound


def switches_of(jinja: str) -> tuple[str, ...]:
    """Return the variables that a template of `bind` leaves free, as true or false."""
    values: dict[str, str] = {}
    position = 0
    while match := _LINE.match(jinja, position):
        values.setdefault(match["name"], match["value"])  # a value that the template sets later is set in any case
        position = match.end()
    return tuple(name for name, value in values.items() if value == _SWITCH.format(name=name))


def _with_values(values: Mapping[str, str], jinja: str) -> str:
    return "".join(_line(name, value) for name, value in values.items()) + jinja


def _line(name: str, value: str) -> str:
    # A line: the newline behind a statement is not written, and what follows starts a line as before.
    return f"{{% set {name} = {value} %}}\n"


def _with_required(
    values: Mapping[str, str], jinja: str, date: datetime.date, tokens: Mapping[str, object]
) -> dict[str, str]:
    """Return the values with a text for each variable without which the template fails."""
    if _renders(_with_values(values, jinja), tokens):
        return {**values}
    undefined = [name for name, value in values.items() if value == _UNDEFINED]
    texts = {name: f'"{format_date(date, _DATES.get(name, ""))}"' for name in undefined}
    if not _renders(_with_values({**values, **texts}, jinja), tokens):
        return {**values}
    for name in undefined:
        fewer = {other: text for other, text in texts.items() if other != name}
        if _renders(_with_values({**values, **fewer}, jinja), tokens):
            texts = fewer
    return {**values, **texts}


def _value_of_tools(values: Mapping[str, str], jinja: str, tokens: Mapping[str, object]) -> dict[str, str]:
    """Return the value of ``tools`` that works where a chat has none; {} if the template treats all of them alike."""
    candidates = [{"tools": f"tools or {nothing}"} for nothing in _NO_TOOLS]
    if any(_line("tools", one["tools"]) in jinja for one in candidates):
        return {}  # bound before
    working = [one for one in candidates if _renders(_with_values({**values, **one}, jinja), tokens)]
    chosen = working[0] if working else candidates[0]
    return chosen if chosen != candidates[0] or sandbox.inspects(jinja, "tools") else {}


def _renders(jinja: str, tokens: Mapping[str, object]) -> bool:
    try:
        sandbox.render(jinja, _QUESTION, None, {**tokens, "add_generation_prompt": True})
    except TemplateError:
        return False
    return True


def _value(name: str, tokens: Mapping[str, object]) -> str:
    """Return the expression for what a variable is in training."""
    if name == "documents":
        return "none"
    return _literal(tokens[name]) if name in tokens else _UNDEFINED


def _literal(token: object) -> str:
    token = str(token)
    quote = "'" if '"' in token else '"'
    if quote in token or not token.isprintable() or "\\" in token:
        raise TemplateError(f"the chat template writes the token {token!r}, which can't be written as Jinja")
    return quote + token + quote


def _check_switches(switches: Collection[str], known: Collection[str]) -> None:
    unknown = [name for name in switches if name not in known]
    if unknown:
        raise ConfigError(
            f"template-switch: the chat template has no variable {', '.join(unknown)}",
            f"It has: {', '.join(known)}." if known else "It has none: omit --template-switch.",
        )
