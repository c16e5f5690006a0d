"""What the engine's process is started with: settings that libraries read once, when they are loaded."""

from __future__ import annotations

_KEPT_PRODUCTS = "64"

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # glibc's allocator gives memory back after each step and gets it again, zeroed, for the next: a third of the time
    # of short rows. What is large has pages of its own all the same: it fits no place that rows of another length
    # have left, and a training on 8,192 tokens would take a quarter more memory.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 22),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    # oneDNN and PyTorch's own layer above it keep what was compiled for each number of rows, 1,024 of them: 10 MB a
    # step, until it is 1 GB. A step needs some twenty.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _KEPT_PRODUCTS,
    "LRU_CACHE_CAPACITY": _KEPT_PRODUCTS,
}

LEAN = {
    # Where the base is parted because memory is short, what a layer was gathered into is given back at once.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
"""In place of the same variables above, for processes that part the base."""
