"""The process of a `PromptServer`: ``python -m kolotune.llamacpp.prompt_server_process``.

Its standard input has a line of JSON, and the header of a GGUF; the server ends when it closes. Its standard output is
for events: the server's address, or an error. llama.cpp's messages go to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import KolotuneError, ToolchainError
from kolotune.foundation.installation import INSTALL_LOCAL
from kolotune.runners import limits, signals
from kolotune.runners.child_process import emit, emit_error

_PROBLEMS_ONLY = 1  # of llama.cpp's levels of messages
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
    signals.ignore_ctrl_c()
    events, sys.stdout = sys.stdout, sys.stderr
    source = sys.stdin.buffer
    task = typed_storage.parse(_Task, source.readline().decode())
    with contextlib.redirect_stdout(events):
        try:
            memory = limits.BYTES + _BYTES_PER_BYTE * task.header
            with (
                _sparse_file(source.read(task.header), task.size) as path,
                limits.library_limits(_START_SECONDS, memory),
            ):
                server = _server(path, task.key)
        except KolotuneError as error:
            emit_error(error)
            return error.exit_code
        emit("listening", address=server.listening_address)
    while source.read(1 << 16):
        pass
    os._exit(0)  # nothing to save; the library would take its time to stop


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
    """Start the server; it serves in threads of its own.

    Raises:
        ToolchainError: the library is missing or can't be loaded.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise ToolchainError(
            f"llama.cpp's server can't be loaded: {error}", f"To install it, {INSTALL_LOCAL}."
        ) from None
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.api_keys = [key]
    parameters.use_jinja = True
    parameters.ui = parameters.endpoint_slots = parameters.warmup = False
    parameters.offline = True
    parameters.verbosity = _PROBLEMS_ONLY
    # As little as it takes: nothing is computed. Fitting the model to the machine would load it twice.
    parameters.fit_params = False
    parameters.n_gpu_layers = 0
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 32
    parameters.n_parallel = parameters.n_threads_http = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.cache_ram_mib, parameters.cache_idle_slots = 0, False
    return xllamacpp.Server(parameters)


if __name__ == "__main__":
    sys.exit(main())
