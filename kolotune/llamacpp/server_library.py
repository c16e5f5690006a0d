"""llama.cpp's server as a library, in a child of `ChildServer`.

The child's standard input has a line of JSON, and the server ends when it closes. Its standard output is for events:
the server's address, or an error. llama.cpp's messages go to standard error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from kolotune.foundation import shared_libraries
from kolotune.foundation.errors import KolotuneError, ToolchainError
from kolotune.foundation.installation import INSTALL_LOCAL
from kolotune.runners import signals
from kolotune.runners.child_process import emit, emit_error

_PROBLEMS_ONLY = 1  # of llama.cpp's levels of messages
_SLEEPING = 0  # of llama.cpp's levels of polling, where its threads are not OpenMP's


def run(start: Callable[[IO[bytes]], Any]) -> int:
    """Serve until standard input closes; return the exit code.

    Args:
        start: reads its task from standard input, and returns the server; a `KolotuneError` is reported.
    """
    signals.ignore_ctrl_c()
    events, sys.stdout = sys.stdout, sys.stderr
    source = sys.stdin.buffer
    with contextlib.redirect_stdout(events):
        try:
            server = start(source)
        except KolotuneError as error:
            emit_error(error)
            return error.exit_code
        emit("listening", address=server.listening_address)
    while source.read(1 << 16):
        pass
    os._exit(0)  # nothing to save; the library would take its time to stop


def load() -> Any:
    """Import xllamacpp.

    Raises:
        ToolchainError: it is missing, or can't be loaded.
    """
    shared_libraries.require_processor()
    shared_libraries.provide_openmp()
    try:
        import xllamacpp
    except ImportError as error:
        raise ToolchainError(
            f"llama.cpp's server can't be loaded: {error}", f"To install it, {INSTALL_LOCAL}."
        ) from None
    return xllamacpp


def local_parameters(path: str, key: str) -> Any:
    """Return the parameters of a server for a GGUF that listens on this machine only and writes problems only.

    Raises:
        ToolchainError: xllamacpp is missing, or can't be loaded.
    """
    parameters = load().CommonParams()
    parameters.model.path = path
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.api_keys = [key]
    parameters.use_jinja = True
    parameters.ui = parameters.endpoint_slots = parameters.warmup = False
    parameters.offline = True
    parameters.verbosity = _PROBLEMS_ONLY
    parameters.cpuparams.poll = parameters.cpuparams_batch.poll = _SLEEPING
    parameters.fit_params = False  # it would load the model twice
    return parameters
