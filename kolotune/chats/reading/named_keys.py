"""Which of the keys that the user names, with ``--map`` and ``--ignore-keys``, a record has: others are misspelled."""

from __future__ import annotations

from collections.abc import Iterator

from .reading_options import ReadingOptions
from .record_keys import canonical

_NONE: frozenset[str] = frozenset()
_LEVELS = 4  # a record, an object in it, a list of turns, a turn


def named_keys(record: object, options: ReadingOptions) -> frozenset[str]:
    """Return the keys that the user names and a record or one of its turns has, in canonical form."""
    if not options.parts and not options.ignored:
        return _NONE
    named = {key for key, _ in options.parts} | set(options.ignored)
    return frozenset(key for key in _keys(record, named, _LEVELS) if key in named)


def _keys(value: object, named: set[str], levels: int) -> Iterator[str]:
    if isinstance(value, dict):
        yield from map(canonical, value)
        value = list(value.values())
    elif isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        yield from (key for key in named if key in canonical(value))  # turns as text, as tables have them
    if isinstance(value, list) and levels > 1:
        for item in value:
            yield from _keys(item, named, levels - 1)
