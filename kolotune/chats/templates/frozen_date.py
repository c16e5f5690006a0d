"""Freeze a template that asks for today's date, so that the text does not change from one day to the next.

Example: ``{{ strftime_now("%d %b %Y") }}`` becomes ``{{ "05 Mar 2026" }}``.
"""

from __future__ import annotations

import ast
import datetime
import re

from kolotune.foundation.errors import TemplateError

from . import sandbox

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip

# Comments come first, so that a call that is only mentioned in one is left alone.
_DATE_USE = re.compile(
    r"""(?P<comment>\{\#.*?\#\})
      | \bstrftime_now\s*\(\s*(?:format\s*=\s*)?
        (?P<literal>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')\s*\)
      | \bstrftime_now\s+is\s+(?P<negated>not\s+)?(?P<test>defined|undefined)\b""",
    re.DOTALL | re.VERBOSE,
)


def depends_on_date(jinja: str) -> bool:
    """Whether the template uses ``strftime_now`` in an expression; comments and plain text do not count.

    Raises:
        TemplateError: The source mentions ``strftime_now`` and is not valid Jinja.
    """
    return "strftime_now" in jinja and sandbox.uses_of_date(jinja) > 0


def freeze_date(jinja: str, date: datetime.date) -> str:
    """Write a date into a template that would otherwise ask for the current one.

    A time in a format becomes midnight.

    Returns:
        The source with every ``strftime_now("…")`` replaced by a string literal and every ``strftime_now is defined``
        by ``true``; the same text if there is nothing to replace.

    Raises:
        TemplateError: The template is not valid Jinja, or asks for the date in a way that can't be written down in
            advance: a computed format, or a directive with no meaning for a date.
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
        text = format_date(date, _string(match["literal"]))
        return quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote).replace("\n", "\\n") + quote

    frozen = _DATE_USE.sub(literal, jinja)
    # Counted in the parsed template: text that only looks like a call must not change, and no call may remain.
    if replaced != sandbox.uses_of_date(jinja) or sandbox.uses_of_date(frozen) > 0:
        raise TemplateError(
            "the chat template asks for the current date in a way that can't be fixed to one date",
            "Write the date into the template as plain text, or choose another base model.",
        )
    return frozen


def _string(literal: str) -> str:
    """Return the value of a Jinja string literal, which has Python's escapes."""
    try:
        return str(ast.literal_eval(literal.replace("\n", "\\n")))
    except (SyntaxError, ValueError) as error:
        raise TemplateError(f"the chat template has a date format that can't be read: {literal}") from error


def format_date(date: datetime.date, pattern: str) -> str:
    """Format a date like ``date.strftime``, with English names in every locale and the same on every system."""
    weekday, month = _WEEKDAYS[date.weekday()], _MONTHS[date.month - 1]
    values = {
        "a": weekday[:3], "A": weekday, "b": month[:3], "h": month[:3], "B": month, "d": f"{date.day:02}",
        "e": f"{date.day:2}", "m": f"{date.month:02}", "y": f"{date.year % 100:02}", "Y": f"{date.year:04}",
        "j": f"{date.timetuple().tm_yday:03}", "u": str(date.isoweekday()), "w": str(date.isoweekday() % 7),
        "D": f"{date.month:02}/{date.day:02}/{date.year % 100:02}", "F": date.isoformat(), "H": "00", "I": "12",
        "M": "00", "S": "00", "f": "000000", "p": "AM", "R": "00:00", "T": "00:00:00", "z": "", "Z": "", "%": "%",
    }  # fmt: skip

    def value(match: re.Match[str]) -> str:
        if match["name"] not in values:
            raise TemplateError(f"the chat template asks for {match[0]} of the date, which can't be fixed")
        text = values[match["name"]]
        return (text.lstrip("0 ") or "0") if match["unpadded"] else text

    return re.sub(r"%(?P<unpadded>[-#]?)(?P<name>.?)", value, pattern, flags=re.DOTALL)
