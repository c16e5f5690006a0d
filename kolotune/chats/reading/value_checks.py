"""Find values in a parsed record that no template or tokenizer can take: NUL, lone surrogates, NaN, deep nesting."""

from __future__ import annotations

import math
import re

from .faults import Fault, FaultKind

MAX_DEPTH = 64
"""Deepest nesting of lists and objects in a record; far below what Python's json can parse."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def value_fault(value: object) -> Fault | None:
    """Return the first fault of a parsed record or part of one, or None."""
    # An explicit stack: the value may be nested deeper than Python can recurse.
    pending: list[tuple[object, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, dict | list):
            if depth >= MAX_DEPTH:
                return Fault(FaultKind.TOO_DEEP, f"nested deeper than {MAX_DEPTH} levels; a chat needs a few")
            parts = [*item, *item.values()] if isinstance(item, dict) else item
            pending.extend((part, depth + 1) for part in parts)
            continue
        fault = _scalar_fault(item)
        if fault is not None:
            return fault
    return None


def _scalar_fault(item: object) -> Fault | None:
    if isinstance(item, str):
        return _text_fault(item)
    if isinstance(item, float):
        if math.isfinite(item):
            return None
        return Fault(FaultKind.NOT_FINITE, "a number is NaN or infinite, which JSON does not allow")
    if item is None or isinstance(item, bool | int):
        return None
    return Fault(FaultKind.BAD_VALUE, f"a value of type {type(item).__name__}; use text, numbers, lists, objects")


def _text_fault(text: str) -> Fault | None:
    if "\0" in text:
        return Fault(FaultKind.NUL, "a NUL character in a text; remove it")
    if match := _SURROGATE.search(text):
        code = f"\\u{ord(match[0]):04x}"
        return Fault(FaultKind.LONE_SURROGATE, f"half a character ({code}) in a text that was cut there; fix the text")
    return None
