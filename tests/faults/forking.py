"""kolotune's processes as forks of one that has loaded the libraries, which takes longer than a tiny run.

They make the same system calls; `workspace.Workspace` compares a run of such forks with an ordinary one.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import psutil

from kolotune.chats.templates import sandbox

_LOADED = (
    "kolotune.cli", "kolotune.pipeline.run", "kolotune.engines.native.training", "kolotune.engines.native.model",
    "kolotune.engines.native.llama", "kolotune.fidelity.measure_models", "kolotune.fidelity.measure_gguf",
    "kolotune.report.page", "kolotune.gguf.quantizer", "kolotune.gguf.conversion_plan",
    "kolotune.gguf.convert", "kolotune.chats.dataset.prepare", "kolotune.ollama.modelfile",
    "kolotune.fidelity.reference_model", "xllamacpp", "gguf", "pydantic", "transformers",
    "transformers.models.llama.modeling_llama", "safetensors.torch", "tokenizers", "jinja2",
    "matplotlib.figure", "filelock", "yaml", "rich.progress",
)  # fmt: skip
_PYTHON = [sys.executable, "-P", "-m"]
_children_die_after = 0.0
_inherited: list[object] = []
ENDED_BY_TIMER = -signal.SIGPROF
"""The exit code of a process that `die_after` has ended."""


def die_after(seconds: float, children: bool = False) -> None:
    """End this process, or each of its children, after some processor time, at any instruction, as SIGKILL does.

    A timer of processor time hits the same code on a busy machine as on an idle one. (Its signal ends a process by
    default; a timer can't send SIGKILL.)
    """
    global _children_die_after
    if children:
        _children_die_after = seconds
    else:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def load() -> None:
    """Load everything that a run may need, and make the runner fork. Call it once, before any other work."""
    import torch

    from kolotune.runners import local

    # Worker threads do not exist in a fork.
    assert torch.get_num_threads() == 1, "set OMP_NUM_THREADS=1 before torch is loaded"
    for name in _LOADED:
        importlib.import_module(name)
    local.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        **{name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "DEVNULL", "TimeoutExpired", "run")},
        Popen=_popen,
    )


class Fork:
    """A forked process, with the part of `subprocess.Popen` that kolotune's runner uses."""

    def __init__(
        self, work: Callable[[], object], stdin: Any, stdout: Any, stderr: Any, env: Mapping[str, str] | None
    ) -> None:
        theirs_in, self.stdin = _pipe_to(stdin)
        theirs_out, self.stdout = _pipe_from(stdout)
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(work, [theirs_in, theirs_out, theirs_out if stderr == subprocess.STDOUT else 2], env)
        for descriptor in (theirs_in, theirs_out):
            os.close(descriptor)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if deadline is None:
                _, status = os.waitpid(self.pid, 0)
                self.returncode = os.waitstatus_to_exitcode(status)
            elif self.poll() is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired("a fork", timeout or 0)
                time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _popen(argv: Sequence[str], **options: Any) -> Any:
    """Replace `subprocess.Popen` in kolotune's runner: fork for modules of kolotune, start other programs as usual."""
    if list(argv[:3]) != _PYTHON or not argv[3].startswith("kolotune"):
        return subprocess.Popen(argv, **options)

    def work() -> object:
        if _children_die_after:
            die_after(_children_die_after)
        return run_module(argv[3], argv[4:])

    fork = Fork(
        work, options["stdin"], options["stdout"], options.get("stderr"),
        options.get("env"),
    )  # fmt: skip
    if options.get("text"):
        fork.stdout = io.TextIOWrapper(fork.stdout, encoding="utf-8", errors="replace")
    return fork


def run_module(name: str, arguments: Sequence[str]) -> object:
    """Run a module as `python -m` does."""
    sys.argv = [name, *arguments]
    return runpy.run_module(name, run_name="__main__", alter_sys=True)


def _pipe_to(kind: Any) -> tuple[int, IO[bytes] | None]:
    if kind == subprocess.PIPE:
        theirs, ours = os.pipe()
        return theirs, os.fdopen(ours, "wb")
    return os.open(os.devnull, os.O_RDONLY), None


def _pipe_from(kind: Any) -> tuple[int, Any]:
    if kind == subprocess.PIPE:
        ours, theirs = os.pipe()
        return theirs, os.fdopen(ours, "rb")
    return os.dup(kind if isinstance(kind, int) else kind.fileno()), None


def _become(work: Callable[[], object], descriptors: list[int], env: Mapping[str, str] | None) -> NoReturn:
    """Do the work in the child, with its own input and output and without the parent's descriptors and handlers."""
    code = 1
    try:
        copies = [os.dup(descriptor) for descriptor in descriptors]
        for number, descriptor in enumerate(copies):
            os.dup2(descriptor, number)
        os.closerange(3, 4096)  # among them the lock, which would stay locked when the parent has ended
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
        sys.stdout, sys.stderr = (
            open(number, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
            for number in (1, 2)
        )
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _inherited.append(sandbox.shared)  # kept, because its end would end the parent's child
        sandbox.shared = sandbox.Sandbox(sandbox.shared.argv)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        result = work()
        code = result if isinstance(result, int) else 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def kolotune(arguments: Sequence[str], output: Path, prelude: Callable[[], None] = lambda: None) -> Fork:
    """Start the command line in a separate session; append its output to `output`.

    Args:
        arguments: of the command line.
        output: file.
        prelude: called first in the new process.
    """

    def work() -> object:
        os.setsid()
        prelude()
        from kolotune.cli import run_command_line

        return run_command_line(list(arguments))

    with output.open("ab") as file:
        return Fork(work, subprocess.DEVNULL, file, subprocess.STDOUT, None)


def family(session: int) -> list[psutil.Process]:
    """Return the running processes of a session."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes
