"""Environment variables of an engine's process, for settings that libraries read once, when they are loaded."""

from __future__ import annotations

_CACHED_PRIMITIVES = "64"

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    # By default glibc's allocator returns memory after each step and gets it back, zeroed, for the next one: a third
    # of the time of short sequences. Large allocations still have pages of their own: they fit no gap that sequences
    # of other lengths have left, and a training on 8,192 tokens would take a quarter more memory.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 22),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    # By default oneDNN, and PyTorch's own layer above it, cache compiled primitives for 1,024 sequence lengths: 10 MB
    # a step, until it is 1 GB. A step needs about twenty.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": _CACHED_PRIMITIVES,
    "LRU_CACHE_CAPACITY": _CACHED_PRIMITIVES,
}

SHARDED_ENVIRONMENT = {
    # A sharded base means that memory is short: the buffer into which a layer was gathered is returned at once.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 20),
}
"""Replaces the same variables of `ENVIRONMENT` in processes that shard the base."""
