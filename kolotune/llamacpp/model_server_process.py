"""The process of a `ModelServer`: ``python -m kolotune.llamacpp.model_server_process``."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kolotune.foundation import typed_storage

from . import server_library, server_program
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
    program = server_program.find()
    return _started_library(task) if program is None else _started_program(program, task)


def _started_library(task: _ServerTask) -> Any:
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
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = _threads(task)
    parameters.lora_adapters = [library.CommonAdapterLoraInfo(path, 0.0) for path in task.adapters]
    parameters.cache_ram_mib = _CACHE_MIB if _caches(task) else 0
    parameters.cache_idle_slots = _caches(task)
    if task.embeds:
        parameters.embedding = True
        parameters.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    return library.Server(parameters)


def _started_program(program: Path, task: _ServerTask) -> server_program.ServerProgram:
    """Start the same server as a program: each option is a parameter of `_started_library`, which says why."""
    caches, threads = _caches(task), str(_threads(task))
    options: dict[str, object] = {
        "--model": task.path, "--alias": task.name,
        "--ctx-size": task.context * task.parallel, "--kv-unified-per-slot": task.context,
        "--parallel": task.parallel, "--threads-http": task.parallel + _WAITING,
        "--batch-size": task.batch, "--ubatch-size": task.batch, "--gpu-layers": task.gpu_layers,
        "--threads": threads, "--threads-batch": threads, "--cache-ram": _CACHE_MIB if caches else 0,
    }  # fmt: skip
    flags = ["--special", "--kv-unified", "--cache-idle-slots" if caches else "--no-cache-idle-slots"]
    if task.template:
        options["--chat-template"] = task.template
    if task.embeds:
        flags.append("--embeddings")
        options["--pooling"] = "mean"
    if task.adapters:
        flags.append("--lora-init-without-apply")
        options["--lora"] = server_program.listed(task.adapters)
    return server_program.ServerProgram(program, options, flags, task.key)


def _caches(task: _ServerTask) -> bool:
    """Whether prompts are kept. What keeps them does not know which adapter a prompt was computed with."""
    return task.parallel > 1 and not task.adapters


def _threads(task: _ServerTask) -> int:
    """Return how many threads compute: not more than cores, of which some processors show two for each."""
    import psutil

    if task.threads:
        return task.threads
    if chosen := os.environ.get("OMP_NUM_THREADS"):
        return int(chosen)
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(free, psutil.cpu_count(logical=False) or free)


if __name__ == "__main__":
    sys.exit(main())
