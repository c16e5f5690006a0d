"""Numbers for modules by patterns of their names, as PEFT's ``rank_pattern`` and ``alpha_pattern`` have them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_NESTED, _REPEATS, _LONGEST = re.compile(r"\)\s*[*+{?]"), re.compile(r"[*+{]"), 300


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return a module's number by PEFT's rule: a pattern is a regular expression for the end of its name, after a dot.

    Args:
        patterns: the first one that fits decides.
        module: its full name.
        default: for modules that none fits.
    """
    return next((number for pattern, number in patterns.items() if fits(pattern, module)), default)


def fits(pattern: str, module: str) -> bool:
    """Whether a pattern is for a module."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def is_heavy(pattern: str) -> bool:
    """Whether matching a pattern may take very long, or it is none: patterns may be another person's."""
    if len(pattern) > _LONGEST or _NESTED.search(pattern) or len(_REPEATS.findall(pattern)) > 3:
        return True
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return True
    return False


def read_patterns(entries: Iterable[str]) -> dict[str, float]:
    """Read patterns as options give them, such as ``q_proj=8``.

    Raises:
        ValueError: an entry has no number, or no pattern that could be matched; the message is the entry.
    """
    patterns: dict[str, float] = {}
    for entry in entries:
        pattern, _, number = str(entry).rpartition("=")
        try:
            patterns[pattern.strip()] = float(number)
        except ValueError:
            raise ValueError(entry) from None
        if not pattern.strip() or is_heavy(pattern.strip()):
            raise ValueError(entry)
    return patterns
