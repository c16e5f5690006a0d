"""Whether an exception means that memory ran out.

Python, PyTorch on a GPU, PyTorch on the CPU and C++ each report it in their own way, some of them only by words.
"""

from __future__ import annotations

import errno

_PHRASES = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _PHRASES)
