"""What llama.cpp says while it works, handed to a function of ours.

llama.cpp keeps the one function that it was given last and calls it from then on, so that this function has to live
as long as the process: what is registered here is never collected, and listeners come and go behind it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from kolotune.foundation.reporter import clean

Listener = Callable[[int, str], None]

_PROBLEMS = (3, 4)  # ggml's levels of warnings and errors


def _tell_problems(level: int, text: str) -> None:
    if level in _PROBLEMS:
        sys.stderr.write(clean(text))  # it repeats names that stand in the file


_listeners: list[Listener] = [_tell_problems]


def only_problems() -> None:
    """From now on warnings and errors go to standard error, and nothing else of what llama.cpp says."""
    import llama_cpp

    llama_cpp.llama_log_set(_registered(), ctypes.c_void_p(0))


@contextlib.contextmanager
def messages_to(listener: Listener) -> Iterator[None]:
    """Inside, `listener` gets every message: a level and a text that need not be a whole line."""
    only_problems()
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@functools.cache
def _registered() -> Any:
    import llama_cpp

    def heard(level: int, text: bytes, _: Any) -> None:
        _listeners[-1](level, text.decode("utf-8", errors="replace"))

    callback: Any = llama_cpp.llama_log_callback
    return callback(heard)
