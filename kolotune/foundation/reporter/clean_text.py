"""Text from files and other programs, made safe for a terminal."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable

_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"  # scripts need them, and so do many emojis


def clean(text: str, keep: str = "\n\t") -> str:
    """Return `text` without control and formatting characters other than those to keep."""
    return "".join(char for char in text if char in keep or unicodedata.category(char) not in _STEERING)


def print_pieces(answer: Iterable[str]) -> None:
    """Print a model's answer piece by piece as it arrives, cleaned."""
    for piece in answer:
        sys.stdout.write(clean(piece, keep="\n\t" + _JOINERS))
        sys.stdout.flush()
    sys.stdout.write("\n")
