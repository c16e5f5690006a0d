"""The process of a `PromptServer`: ``python -m kolotune.llamacpp.prompt_server_process``.

Behind the task, its standard input has the header of a GGUF.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kolotune.foundation import typed_storage
from kolotune.runners import limits

from . import server_library

_START_SECONDS = 10  # of processor time; the largest vocabularies take 2
_BYTES_PER_BYTE = 32  # memory for a vocabulary, of which this many are more than twice what the known ones take


@dataclass(frozen=True)
class _Task:
    """The first line of standard input.

    Attributes:
        key: that requests must have.
        header: bytes of the GGUF's header, which follow.
        size: bytes of the GGUF.
    """

    key: str
    header: int
    size: int


def main() -> int:
    """Serve until standard input closes; return the exit code."""
    return server_library.run(_start)


def _start(source: IO[bytes]) -> Any:
    task = typed_storage.parse(_Task, source.readline().decode())
    memory = limits.BYTES + _BYTES_PER_BYTE * task.header
    with (
        _sparse_file(source.read(task.header), task.size) as path,
        limits.library_limits(_START_SECONDS, memory),
    ):
        return _server(path, task.key)


@contextlib.contextmanager
def _sparse_file(header: bytes, size: int) -> Iterator[Path]:
    """Write a file whose data is zeros; where the system can, in memory, so that nothing is left behind."""
    if hasattr(os, "memfd_create"):
        number = os.memfd_create("model.gguf")
        try:
            with open(number, "wb", closefd=False) as file:
                file.write(header)
            os.truncate(number, size)
            yield Path(f"/proc/self/fd/{number}")
        finally:
            os.close(number)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        path.write_bytes(header)
        os.truncate(path, size)
        yield path


def _server(path: Path, key: str) -> Any:
    """Start the server; it serves in threads of its own."""
    parameters = server_library.local_parameters(str(path), key)
    # As little as it takes: nothing is computed.
    parameters.n_gpu_layers = 0
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 32
    parameters.n_parallel = parameters.n_threads_http = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_ram_mib, parameters.cache_idle_slots = 0, False
    return server_library.load().Server(parameters)


if __name__ == "__main__":
    sys.exit(main())
