"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Small blocks, all freed but the last, which is at the end of the heap: the C library can't shorten it by itself.
PROGRAM = """
import ctypes, sys
from pathlib import Path
from kolotune.foundation.free_memory import return_free_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

allocate, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
allocate.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [allocate(1000) for _ in range(100_000)]
for block in blocks:
    ctypes.memset(block, 1, 1000)
for block in blocks[:-1]:
    free(block)
before = resident()
return_free_memory()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_freed_memory_goes_back() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) > 80_000_000
