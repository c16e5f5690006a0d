"""A user's own `llama-server`, which may be built for this machine, in place of the prebuilt server.

It runs in a child of `ChildServer` as the library does, of which it is the child in turn. Among several models
llama.cpp's server starts itself once for each of them; such a server ends when its standard input closes, whatever
ended the process that holds the other end. So it is started as one of these.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kolotune.foundation import shared_libraries
from kolotune.foundation.errors import ToolchainError
from kolotune.runners import local

from .log import show_problem

_ONE_OF_SEVERAL = {"LLAMA_SERVER_ROUTER_PORT": "0"}
_KEY = "LLAMA_API_KEY"  # an option could be read by all users of this machine
_OPTIONS_OF_USERS = "LLAMA_ARG_"  # variables; they are meant for servers that users start themselves
# As `server_library.local_parameters` sets them; the address is among the messages of level 3.
_LOCAL = [
    "--host", "127.0.0.1", "--port", "0", "--jinja", "--no-ui", "--no-slots", "--no-warmup", "--offline",
    # The program has the thoughts of earlier turns kept where nothing is said about it; the library leaves it open.
    "--chat-template-kwargs", '{"preserve_reasoning": null}',
    "--fit", "off", "--poll", "0", "--poll-batch", "0", "--log-verbosity", "3", "--log-prefix", "--log-colors", "off",
]  # fmt: skip
_ADDRESS = re.compile(r"listening on (http://\S+)")
_PROBLEM = " E "


def find() -> Path | None:
    """Return the program in the user's own llama.cpp; None when there is none, and the prebuilt server answers."""
    return shared_libraries.own_program("llama-server")


class ServerProgram:
    """The running program. This process ends when it does.

    Args:
        program: the file.
        options: of the program, with their values.
        flags: options without a value.
        key: that requests must have.

    Attributes:
        listening_address: where it listens.

    Raises:
        ToolchainError: it can't be started, or does not know an option.
        SystemExit: it ended as it loaded the model. What went wrong is on standard error, as with the library.
    """

    def __init__(self, program: Path, options: Mapping[str, object], flags: Sequence[str], key: str) -> None:
        argv = [str(program), *arguments(options, flags)]
        for name in [name for name in os.environ if name.startswith(_OPTIONS_OF_USERS)]:
            del os.environ[name]  # this process has no other child
        self._open = contextlib.ExitStack()
        reading, writing = os.pipe()
        messages = self._open.enter_context(os.fdopen(reading, encoding="utf-8", errors="replace"))
        try:
            with os.fdopen(writing, "wb") as errors:
                running = local.piped(argv, {**_ONE_OF_SEVERAL, _KEY: key}, errors)
                child = self._open.enter_context(running)
        except OSError as error:
            raise _unfit(program, f"can't be started: {error}") from None
        said: list[str] = []
        self.listening_address = _address(messages, said)
        if not self.listening_address:
            code = child.wait()
            if any(map(_is_problem, said)):
                sys.exit(code or 1)
            raise _unfit(program, f"ended with exit code {code}{_reason(said)}")
        for work in (lambda: _pass_on(messages), lambda: _discard(child), lambda: _end_with(child)):
            threading.Thread(target=work, daemon=True).start()


def arguments(options: Mapping[str, object], flags: Iterable[str]) -> list[str]:
    """Return the program's arguments: those of every model, and these."""
    given = (text for name, value in options.items() for text in (name, str(value)))
    return [*_LOCAL, *flags, *given]


def listed(paths: Iterable[str]) -> str:
    """Return paths as a value of an option that takes several."""
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="").writerow(paths)
    return text.getvalue()


def _unfit(program: Path, problem: str) -> ToolchainError:
    return ToolchainError(
        f"{program} {problem}",
        f"kolotune is made for build {shared_libraries.BUILD} of llama.cpp. Use that one, or unset LLAMA_CPP_DIR.",
    )


def _address(messages: Iterable[str], said: list[str]) -> str:
    """Return the address that it reports; "" when it ends without one.

    Args:
        messages: its lines.
        said: gets the lines before the address.
    """
    for line in messages:
        if found := _ADDRESS.search(line):
            return found[1]
        said.append(line.strip())
        _show_problem(line)
    return ""


def _reason(said: list[str]) -> str:
    """Return what it said about an error, or else last, to follow a sentence."""
    lines = [line for line in said if line]
    reason = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    return reason and f": {reason}"


def _pass_on(messages: Iterable[str]) -> None:
    """Read on, so that it never waits to be read."""
    for line in messages:
        _show_problem(line)


def _show_problem(line: str) -> None:
    if _is_problem(line):
        show_problem(line)


def _is_problem(line: str) -> bool:
    return _PROBLEM in line


def _discard(child: subprocess.Popen[bytes]) -> None:
    assert child.stdout is not None
    while child.stdout.read(1 << 16):
        pass


def _end_with(child: subprocess.Popen[bytes]) -> None:
    """End this process as the program ended."""
    code = child.wait()
    if code < 0:
        signal.raise_signal(-code)
    os._exit(code or 1)
