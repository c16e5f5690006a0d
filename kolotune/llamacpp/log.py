"""llama.cpp's messages, handed to a function of ours.

llama.cpp keeps the last function that it was given and calls it from any thread until the process ends. So one function
is registered for good, and handlers come and go behind it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kolotune.foundation.reporter import clean

from . import library

MessageHandler = Callable[[int, str], None]
"""Called with ggml's level and a text that need not be a whole line."""
_PROBLEM_LEVELS = (3, 4)  # ggml's warnings and errors


def show_problem(text: str) -> None:
    """Write a message about a problem to standard error."""
    sys.stderr.write(clean(text))  # it may repeat names from the file
    sys.stderr.flush()


def _print_problems(level: int, text: str) -> None:
    if level in _PROBLEM_LEVELS:
        show_problem(text)


_handlers: list[MessageHandler] = [_print_problems]


def print_only_problems() -> None:
    """From now on, write warnings and errors to standard error and drop llama.cpp's other messages."""
    library.load().llama_log_set(_registered(), None)


@contextlib.contextmanager
def messages_to(handler: MessageHandler) -> Iterator[None]:
    """Within the block, `handler` gets every message."""
    print_only_problems()
    _handlers.append(handler)
    try:
        yield
    finally:
        _handlers.remove(handler)


@contextlib.contextmanager
def collect_problems() -> Iterator[list[str]]:
    """Within the block, write every message to standard error; the list receives warnings and errors."""
    problems: list[str] = []

    def handle(level: int, text: str) -> None:
        sys.stderr.write(text)
        if level in _PROBLEM_LEVELS and text.strip():
            problems.append(text.strip())

    with messages_to(handle):
        yield problems


@functools.cache
def _registered() -> Any:
    def on_message(level: int, text: bytes, _: object) -> None:
        _handlers[-1](level, text.decode("utf-8", errors="replace"))

    return library.LogCallback(on_message)
