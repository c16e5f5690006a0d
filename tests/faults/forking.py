"""kolotune's processes as forks of one that has the libraries loaded: loading them costs more than a tiny run's work.

What they do is the same, system call by system call; `room.Room` holds a run of such forks against an ordinary one.
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
from kolotune.foundation import files

_LOADED = (
    "kolotune.cli", "kolotune.pipeline.run", "kolotune.engines.native.training", "kolotune.engines.native.model",
    "kolotune.engines.native.llama", "kolotune.fidelity.measure_models", "kolotune.fidelity.measure_gguf",
    "kolotune.report.page", "kolotune.gguf.quantizer", "kolotune.gguf.inference", "kolotune.gguf.conversion_plan",
    "kolotune.gguf.convert", "kolotune.chats.dataset.prepare", "kolotune.ollama.template",
    "kolotune.fidelity.reference_model", "llama_cpp", "gguf", "pydantic", "transformers",
    "transformers.models.llama.modeling_llama", "safetensors.torch", "tokenizers", "jinja2",
    "matplotlib.figure", "filelock", "yaml", "rich.progress",
)  # fmt: skip
_PYTHON = [sys.executable, "-P", "-m"]
_children_die_after = 0.0
_inherited: list[object] = []
ENDED_BY_TIMER = -signal.SIGPROF
"""The exit code of a process that `die_after` ended."""


def die_after(seconds: float, children: bool = False) -> None:
    """Ends this process, or each that it starts, when it has computed for so long; at any instruction, as SIGKILL does.

    A timer of processor time hits the same places on a busy machine as on an idle one. (Its signal ends a process that
    does not ask for it; SIGKILL can't be sent by a timer.)
    """
    global _children_die_after
    if children:
        _children_die_after = seconds
    else:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def load() -> None:
    """Loads everything that a run may need, and lets the runner fork; once, before any other work."""
    import torch

    from kolotune.runners import local

    # Threads that wait for work would not be there in a fork.
    assert torch.get_num_threads() == 1, "wants OMP_NUM_THREADS=1 before torch is loaded"
    for name in _LOADED:
        importlib.import_module(name)
    local.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        **{name: getattr(subprocess, name) for name in ("PIPE", "STDOUT", "DEVNULL", "TimeoutExpired", "run")},
        Popen=_popen,
    )


class Fork:
    """A process made by forking; as much of `subprocess.Popen` as kolotune's runner asks for."""

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
        for each in (theirs_in, theirs_out):
            os.close(each)

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
    """In place of `subprocess.Popen` in kolotune's runner: modules of kolotune are forks, the rest is as ever."""
    if list(argv[:3]) != _PYTHON or not argv[3].startswith("kolotune"):
        return subprocess.Popen(argv, **options)

    def work() -> object:
        if _children_die_after:
            die_after(_children_die_after)
        return run_module(argv[3], argv[4:])

    made = Fork(
        work, options["stdin"], options["stdout"], options.get("stderr"),
        options.get("env"),
    )  # fmt: skip
    if options.get("text"):
        made.stdout = io.TextIOWrapper(made.stdout, encoding="utf-8", errors="replace")
    return made


def run_module(name: str, arguments: Sequence[str]) -> object:
    """As `python -m`."""
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
    """The child's side: its own input and output, no descriptor, handler or variable of the parent's; then the work."""
    code = 1
    try:
        copies = [os.dup(each) for each in descriptors]
        for number, each in enumerate(copies):
            os.dup2(each, number)
        os.closerange(3, 4096)  # the lock among them: it would stay held when the parent is gone
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
        sys.stdout, sys.stderr = (
            open(each, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
            for each in (1, 2)
        )
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for remembered in (files._written, files._settled):  # a new process would know of no file
            remembered.clear()
        _inherited.append(sandbox.shared)  # kept, since its end would end the parent's child
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
    """Starts the command line in a session of its own; what it prints is appended to `output`.

    Args:
        arguments: of the command line.
        output: file.
        prelude: done in the new process first.
    """

    def work() -> object:
        os.setsid()
        prelude()
        from kolotune.cli import run_command_line

        return run_command_line(list(arguments))

    with output.open("ab") as file:
        return Fork(work, subprocess.DEVNULL, file, subprocess.STDOUT, None)


def family(session: int) -> list[psutil.Process]:
    """The living processes of a session."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found
