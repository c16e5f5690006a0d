"""The process of a `ModelServer`: ``python -m kolotune.llamacpp.model_server_process``."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import IO, Any

from kolotune.foundation import typed_storage

from . import server_library
from .model_server import ServerSettings

_CACHE_MIB = 1024
"""Memory for prompts of conversations that wait while others are answered."""
_WAITING = 32
"""Requests that may wait."""


@dataclass(frozen=True, kw_only=True)
class _ServerTask(ServerSettings):
    """The line of standard input.

    Attributes:
        key: that requests must have.
        path: the GGUF.
    """

    key: str
    path: str


def main() -> int:
    """Serve until standard input closes; return the exit code."""
    return server_library.run(_start)


def _start(source: IO[bytes]) -> Any:
    task = typed_storage.parse(_ServerTask, source.readline().decode())
    library = server_library.load()
    parameters = server_library.local_parameters(task.path, task.key)
    parameters.model_alias = {task.name}
    parameters.chat_template = task.template
    parameters.special = True
    parameters.n_ctx, parameters.n_parallel = task.context * task.parallel, task.parallel
    # One cache for all requests: split into several, it has wrong embeddings for texts of different lengths.
    parameters.kv_unified, parameters.kv_unified_per_slot = True, task.context
    parameters.n_threads_http = task.parallel + _WAITING
    parameters.n_batch = parameters.n_ubatch = task.batch
    parameters.n_gpu_layers = task.gpu_layers
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = task.threads or _threads()
    parameters.lora_adapters = [library.CommonAdapterLoraInfo(path, 0.0) for path in task.adapters]
    # The cache does not know which adapter a prompt was computed with.
    caches = task.parallel > 1 and not task.adapters
    parameters.cache_ram_mib = _CACHE_MIB if caches else 0
    parameters.cache_idle_slots = caches
    if task.embeds:
        parameters.embedding = True
        parameters.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return library.Server(parameters)


def _threads() -> int:
    """Return how many threads compute: not more than cores, of which some processors show two for each."""
    import psutil

    if chosen := os.environ.get("OMP_NUM_THREADS"):
        return int(chosen)
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(free, psutil.cpu_count(logical=False) or free)


if __name__ == "__main__":
    sys.exit(main())
