"""The only place that prints to the user: rich in a terminal, plain lines elsewhere, JSON lines for programs."""

from __future__ import annotations

import sys

from .clean_text import clean, print_pieces
from .events import EVENTS, WITH_MORE_FIELDS
from .json_lines import JsonReporter
from .plain import PlainReporter
from .protocol import Progress, Reporter
from .replay import Replay, parse_event
from .terminal import RichReporter

__all__ = [
    "EVENTS", "WITH_MORE_FIELDS", "JsonReporter", "PlainReporter", "Progress", "Replay", "Reporter", "RichReporter",
    "clean", "make_reporter", "parse_event", "print_pieces",
]  # fmt: skip


def make_reporter(as_json: bool = False) -> Reporter:
    """Return the reporter that suits where standard output goes."""
    if as_json:
        return JsonReporter()
    return RichReporter() if sys.stdout.isatty() else PlainReporter()
