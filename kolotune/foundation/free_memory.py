"""Hand memory that is no longer needed back to the system."""

from __future__ import annotations

import ctypes
import mmap
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


def release_mapped(address: int, size: int) -> None:
    """Let go of the pages of a part of a mapped file, which were read and are not needed soon (Linux).

    Otherwise they count as this process's memory as long as the file is mapped. Whoever reads them again gets them from
    the system's cache. Of memory that is no file this would take the content: never call it for that.
    """
    if sys.platform != "linux":
        return
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
