"""The chat template: one text that is stored, trained on and served.

`freeze_date` turns a template that asks for today's date into one that states a date, so that the text does
not change from one day to the next. `ChatTemplate` renders chats as transformers does.
"""

from __future__ import annotations

import ast
import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kolotune.foundation.errors import TemplateError

from . import sandbox

# A place for text in a chat: the number of its message, and "content", "reasoning" or "call" (a tool's name).
Slot = tuple[int, str]

_PLAIN = {"role", "content"}
_SKELETONS_KEPT = 1_000
_LONGEST = 1 << 20  # characters of a template; the longest that are known have 30,000

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

# Comments come first, so that a call that is only mentioned in one is left alone.
_DATE_USE = re.compile(
    r"""(?P<comment>\{\#.*?\#\})
      | \bstrftime_now\s*\(\s*(?:format\s*=\s*)?
        (?P<literal>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*\)
      | \bstrftime_now\s+is\s+(?P<negated>not\s+)?(?P<test>defined|undefined)\b""",
    re.DOTALL | re.VERBOSE,
)


def depends_on_date(jinja: str) -> bool:
    """Whether the template asks for the current date.

    Args:
        jinja: the template's source.

    Returns:
        True when ``strftime_now`` is used in an expression; a comment or plain text does not count.

    Raises:
        TemplateError: the source mentions ``strftime_now`` and is not valid Jinja.
    """
    return "strftime_now" in jinja and sandbox.uses_of_date(jinja) > 0


def freeze_date(jinja: str, date: datetime.date) -> str:
    """Write a date into a template that would otherwise ask for the current one.

    Args:
        jinja: the template's source.
        date: the date to write; a time in a format becomes midnight.

    Returns:
        The source with every ``strftime_now("…")`` replaced by a string literal and every
        ``strftime_now is defined`` by ``true``; the very same text when there is nothing to replace.

    Raises:
        TemplateError: the template is not valid Jinja, or asks for the date in a way that can't be written
            down beforehand: a format that is computed, or a directive with no meaning for a date.
    """
    if not depends_on_date(jinja):
        return jinja
    replaced = 0

    def literal(match: re.Match[str]) -> str:
        nonlocal replaced
        if match["comment"] is not None:
            return match[0]
        replaced += 1
        if match["test"] is not None:
            return "true" if (match["test"] == "defined") != bool(match["negated"]) else "false"
        quote = match["literal"][0]
        text = _strftime(date, _string(match["literal"]))
        return quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote).replace("\n", "\\n") + quote

    frozen = _DATE_USE.sub(literal, jinja)
    # Counted on the parsed template: text that only looks like a call must not have been touched, and no call
    # may be left.
    if replaced != sandbox.uses_of_date(jinja) or sandbox.uses_of_date(frozen) > 0:
        raise TemplateError(
            "the chat template asks for the current date in a way that can't be fixed to one date",
            "Write the date into the template as plain text, or choose another base model.",
        )
    return frozen


class ChatTemplate:
    """A chat template with the special tokens that it may name.

    Args:
        jinja: the template's source.
        special_tokens: ``bos_token``, ``eos_token``, … as the tokenizer has them; None values are left out.

    Attributes:
        jinja: the template's source.
        special_tokens: name to text.

    Raises:
        TemplateError: there is no template, or it is not valid Jinja.
    """

    def __init__(self, jinja: str | None, special_tokens: Mapping[str, Any]) -> None:
        if not jinja or not jinja.strip():
            raise TemplateError(
                "the base model has no chat template",
                "Use an instruction-tuned model: its tokenizer comes with a chat template.",
            )
        if len(jinja) > _LONGEST:
            raise TemplateError(f"the chat template is longer than {_LONGEST} characters")
        sandbox.uses_of_date(jinja)  # that is, can it be read at all?
        self._skeletons: dict[Any, tuple[str, list[str], list[Slot]]] = {}
        self.jinja = jinja
        self.special_tokens = {
            name: [str(one) for one in token] if isinstance(token, (list, tuple)) else str(token)
            for name, token in special_tokens.items()
            if token is not None
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, (self.jinja, self.special_tokens)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a chat, as transformers' ``apply_chat_template`` writes it.

        Args:
            messages: the turns, each with ``role`` and ``content``.
            tools: tool definitions in the OpenAI shape; None and an empty list are the same.
            add_generation_prompt: end with the opening of the assistant's next turn.

        Returns:
            The text, with the special tokens (also the first one) written out.

        Raises:
            TemplateError: the template refuses these messages, or fails on them, with its own words; or it takes too
                much time, memory or room.
        """
        options = {"add_generation_prompt": add_generation_prompt, **self.special_tokens}
        return sandbox.render(self.jinja, messages, tools or None, options)

    def around(self, roles: Sequence[str], prompt: bool) -> sandbox.Around | None:
        """What the template writes around the texts of turns with these roles, if it only passes them on.

        Args:
            roles: who speaks; each turn is a role and a text that is not blank.
            prompt: open the assistant's next turn.

        Returns:
            The pieces around the texts, and for each place between them the number of the turn and whether its text is
            trimmed; None when what it writes depends on the texts.

        Raises:
            TemplateError: the template refuses these turns, or takes too much.
        """
        options = {"add_generation_prompt": prompt, "tools": None, "documents": None, **self.special_tokens}
        return sandbox.around(self.jinja, list(roles), options)

    def skeleton(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], prompt: bool, mark: str
    ) -> tuple[str, list[str], list[Slot]]:
        """Renders messages whose texts are marks, and takes the rendering apart at them.

        Args:
            messages: the turns; a mark is its number and name, as in `Slot`, between two `mark`.
            tools: tool definitions.
            prompt: open the assistant's next turn.
            mark: the character.

        Returns:
            The rendering, the pieces around the marks and the marks' slots. Chats of one shape share them: they
            must not be changed.

        Raises:
            TemplateError: the template refuses the messages.
        """
        key: Any = None
        if not tools and all(message.keys() == _PLAIN for message in messages):
            key = prompt, mark, tuple((message["role"], message["content"]) for message in messages)
            if key in self._skeletons:
                return self._skeletons[key]
        text = self.render(messages, tools, prompt)
        found = re.split(rf"{mark}(\d+)([a-z]+){mark}", text)
        slots = [(int(index), name) for index, name in zip(found[1::3], found[2::3], strict=True)]
        if key is not None:
            if len(self._skeletons) >= _SKELETONS_KEPT:
                self._skeletons.clear()
            self._skeletons[key] = text, found[::3], slots
        return text, found[::3], slots


def _string(literal: str) -> str:
    """The value of a string literal of Jinja, whose escapes are Python's."""
    try:
        return str(ast.literal_eval(literal.replace("\n", "\\n")))
    except (SyntaxError, ValueError) as error:
        raise TemplateError(f"the chat template has a date format that can't be read: {literal}") from error


def _strftime(date: datetime.date, pattern: str) -> str:
    """``date.strftime`` with English names whatever the locale is, and the same on every system."""
    values = {
        "a": _WEEKDAYS[date.weekday()][:3],
        "A": _WEEKDAYS[date.weekday()],
        "b": _MONTHS[date.month - 1][:3],
        "h": _MONTHS[date.month - 1][:3],
        "B": _MONTHS[date.month - 1],
        "d": f"{date.day:02}",
        "e": f"{date.day:2}",
        "m": f"{date.month:02}",
        "y": f"{date.year % 100:02}",
        "Y": f"{date.year:04}",
        "j": f"{date.timetuple().tm_yday:03}",
        "u": str(date.isoweekday()),
        "w": str(date.isoweekday() % 7),
        "D": f"{date.month:02}/{date.day:02}/{date.year % 100:02}",
        "F": date.isoformat(),
        "H": "00",
        "I": "12",
        "M": "00",
        "S": "00",
        "f": "000000",
        "p": "AM",
        "R": "00:00",
        "T": "00:00:00",
        "z": "",
        "Z": "",
        "%": "%",
    }

    def value(match: re.Match[str]) -> str:
        if match["name"] not in values:
            raise TemplateError(f"the chat template asks for {match[0]} of the date, which can't be fixed")
        text = values[match["name"]]
        return (text.lstrip("0 ") or "0") if match["unpadded"] else text

    return re.sub(r"%(?P<unpadded>[-#]?)(?P<name>.?)", value, pattern, flags=re.DOTALL)
