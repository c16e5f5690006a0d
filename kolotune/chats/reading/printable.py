"""Text from strangers' files, made safe and short enough for a message."""

from __future__ import annotations

import re
import unicodedata

_TERMINAL_ESCAPE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor, clearing
    r"|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # OSC, DCS and similar: titles, links, clipboard
    r"|\x9b[0-?]*[ -/]*[@-~]"  # CSI as one C1 character
    r"|\x1b."
)
# Cf has the bidirectional overrides, which make a line look like a different one.
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str, limit: int = 60) -> str:
    """Return text as one line without terminal escapes, control and invisible characters, cut with ``…`` at `limit`."""
    # Cut first, so that a line of megabytes costs nothing. The margin is for escapes, which are removed.
    head = text[: limit * 4 + 64]
    clean = _TERMINAL_ESCAPE.sub("", head)
    clean = "".join(" " if char.isspace() else char for char in clean)
    clean = "".join(char for char in clean if unicodedata.category(char) not in _HIDDEN_CATEGORIES)
    clean = " ".join(clean.split())
    if len(clean) <= limit and len(head) == len(text):
        return clean
    return clean[: max(limit - 1, 0)] + "…"


def quoted(text: str, limit: int = 40) -> str:
    """Return `printable` text in double quotes: a key, a role or a name in a message."""
    return f'"{printable(text, limit)}"'
