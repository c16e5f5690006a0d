"""The filled keys of a record, which of them were read, and what becomes of the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from .json_values import is_filled
from .markers import is_marker
from .printable import printable
from .reading_options import ReadingOptions
from .record_keys import COMPANIONS, METADATA, READ_KEYS, RecordPart, canonical


class RecordFields:
    """The keys of a record in canonical form.

    Args:
        record: The record.
        options: Which keys have a part of the chat, and which are ignored.

    Attributes:
        values: All values by key; of keys that differ only in their case, the first.
        filled: The keys that say something.
    """

    def __init__(self, record: Mapping[str, object], options: ReadingOptions) -> None:
        self.values: dict[str, object] = {}
        self._names: dict[str, str] = {}
        for name, value in record.items():
            key = canonical(name)
            if key in options.ignored:
                continue
            key = f" {name}" if key in self.values else key  # no canonical key starts with a space
            self.values[key], self._names[key] = value, name
        self.filled = {key for key, value in self.values.items() if is_filled(value)}
        self._mapped = [(key, part) for key, part in options.parts if key in self.values] if options.parts else []
        self._read: set[str] = set()
        self._only_mapped: set[RecordPart] = set()

    def read_only_if_mapped(self, part: RecordPart) -> None:
        """Read a part from now on only from the keys that the user gave it."""
        self._only_mapped.add(part)

    def mapped(self, part: RecordPart) -> list[str]:
        """Return the keys that the user gave for a part."""
        return [key for key, given in self._mapped if given is part]

    def companions(self, part: RecordPart) -> list[str]:
        """Return the filled keys of a part beside question, answer or turns."""
        known = () if part in self._only_mapped else COMPANIONS.get(part, ())
        if not self._mapped and self.filled.isdisjoint(known):
            return []
        known = tuple([key for key in known if key not in self.given])
        return [key for key in [*self.mapped(part), *known] if key in self.filled and key not in self._read]

    @property
    def given(self) -> set[str]:
        """The keys that the user gave a part."""
        return {key for key, _ in self._mapped}

    def read(self, key: str) -> object:
        """Return a value, and remember that it was read."""
        self._read.add(key)
        return self.values.get(key)

    def read_all(self, part: RecordPart) -> list[tuple[str, object]]:
        """Return the values of a part with their keys, and remember that they were read; without empty cells."""
        return [(key, value) for key in self.companions(part) if not is_marker(value := self.read(key))]

    def unread(self, said: Iterable[str]) -> list[tuple[str, object]]:
        """Return the filled keys that were not read, as they are spelled, with their values.

        Args:
            said: The texts of the chat. A key whose text is among them is not lost.
        """
        rest = self.filled - self._read
        if not rest:
            return []
        return not_said([(self._names[key], self.values[key]) for key in self.values if key in rest], said)


class KeysBesideTurns(NamedTuple):
    """The keys of a record with "messages", as they are spelled.

    Attributes:
        read: Other keys that are read if they are filled.
        unread: Keys that are not read, whatever they contain.
    """

    read: tuple[str, ...]
    unread: tuple[str, ...]


@lru_cache(1024)
def keys_beside_turns(names: tuple[str, ...], ignored: tuple[str, ...]) -> KeysBesideTurns | None:
    """Return the keys beside "messages", which is one of the names; None if two names are one in canonical form."""
    keys = [canonical(name) for name in names]
    if "messages" in ignored or len(set(keys)) < len(keys):
        return None
    beside = [(name, key) for name, key in zip(names, keys, strict=True) if key != "messages" and key not in ignored]
    read, unread = ([name for name, key in beside if (key in READ_KEYS) is is_read] for is_read in (True, False))
    return KeysBesideTurns(tuple(read), tuple(unread))


def not_said(unread: list[tuple[str, object]], said: Iterable[str]) -> list[tuple[str, object]]:
    """Return unread keys as they are shown, without those whose text is one of the chat's.

    Args:
        unread: The keys, as they are spelled, with their values.
        said: The texts of the chat.
    """
    if any([canonical(name) not in METADATA for name, _ in unread]):
        texts = {text.strip() for text in said}
        unread = [each for each in unread if not (isinstance(each[1], str) and each[1].strip() in texts)]
    return [(_shown(name), value) for name, value in unread]


@lru_cache(4096)
def _shown(name: str) -> str:
    return printable(name, 40)


def unread_hash(unread: Iterable[tuple[str, object]]) -> int:
    """Return a hash of what is not read, but for what only describes a record; 0 if that is nothing."""
    rest = {key: value for key, value in unread if canonical(key) not in METADATA}
    if not rest:
        return 0
    text = json.dumps(rest, sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8])
