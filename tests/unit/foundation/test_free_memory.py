"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


MAPPED = """
import sys
from pathlib import Path
import numpy as np
from kolotune.foundation.free_memory import release_mapped

def of_files():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

mapped = np.memmap(sys.argv[1], dtype=np.uint8, mode="r")
first = int(mapped.sum())
before = of_files()
release_mapped(mapped.ctypes.data + 100, mapped.nbytes - 100)
print(before - of_files(), int(mapped.sum()) == first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the pages")
def test_pages_of_a_mapped_file_are_let_go_and_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 40_000)
    done = subprocess.run([sys.executable, "-c", MAPPED, file], stdout=subprocess.PIPE, text=True, check=True)
    kilobytes, is_same = done.stdout.split()
    assert int(kilobytes) > 9_000 and is_same == "True"
