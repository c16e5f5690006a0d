"""Hand memory that was freed back to the system."""

from __future__ import annotations

import ctypes
import sys


def return_free_memory() -> None:
    """Hand this process's freed memory back to the system, where the C library keeps it otherwise (glibc).

    To be called after something large was read whose parts are garbage by then: a tokenizer's JSON leaves half as much
    again as the tokenizer. It takes a few milliseconds.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)
