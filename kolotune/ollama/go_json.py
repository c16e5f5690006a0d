"""Write JSON as Go's encoding/json does, in which Ollama's templates print tools and arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal

_BY_NUMBER = "<>&\u2028\u2029"
_LARGE, _SMALL = 1e21, 1e-6  # from where on Go writes an exponent


def go_json(value: object) -> str:
    """Return the JSON text of a value: without spaces, with these characters by number: ``< > &``."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_text(str(key))}:{go_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(go_json, value)) + "]"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return _number(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _text(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    for character in _BY_NUMBER:
        quoted = quoted.replace(character, f"\\u{ord(character):04x}")
    return quoted


def _number(value: float) -> str:
    """A number of JSON becomes a float64 in Go, and is written without an exponent if it is of usual size."""
    number = float(value)
    if not math.isfinite(number):
        raise TypeError(f"{number} has no form in JSON")
    if number == 0 or _SMALL <= abs(number) < _LARGE:
        return format(Decimal(repr(number)), "f").removesuffix(".0")
    mantissa, _, exponent = repr(number).partition("e")
    return f"{mantissa.removesuffix('.0')}e{exponent[0]}{exponent[1:].lstrip('0')}"
