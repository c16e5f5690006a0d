"""Where chat templates run: never in a process that has anything to lose.

A worker that prepares chats is confined already, and renders itself. Every other process has one child of this module
for it, started when it is first needed, which has no files, starts no processes, and gets and gives nothing but JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import threading
from typing import Any, BinaryIO

from kolotune.foundation.errors import TemplateError
from kolotune.runners import limits, local

Around = tuple[list[str], list[tuple[int, bool]]]  # as in `unseen`, which is loaded where templates run
_LARGEST = 1 << 30  # bytes of a question or an answer
_KNOWN = 32  # templates that a child is sent once


def uses_of_date(jinja: str) -> int:
    """How often ``strftime_now`` stands in an expression of the template.

    Raises:
        TemplateError: it is not valid Jinja, or takes too much to be read.
    """
    return int(_call("uses_of_date", jinja))


def render(jinja: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, more: dict[str, Any]) -> str:
    """The text of a chat.

    Args:
        jinja: the template's source.
        messages: the turns.
        tools: tool definitions in the OpenAI shape.
        more: the template's other variables.

    Raises:
        TemplateError: the template fails on these messages, or takes too much time, memory or room.
    """
    return str(_call("render", jinja, messages, tools, more))


def around(jinja: str, roles: list[str], options: dict[str, Any]) -> Around | None:
    """What the template writes around the texts of turns with these roles; see `unseen.around`.

    Raises:
        TemplateError: the template fails on these turns, or takes too much.
    """
    found = _call("around", jinja, roles, options)
    return None if found is None else (found[0], [(index, trimmed) for index, trimmed in found[1]])


def _call(name: str, jinja: str, *arguments: Any) -> Any:
    if limits.is_confined():
        from . import jinja as here

        return getattr(here, name)(jinja, *arguments)
    with _lock:
        return _child.ask(name, jinja, *arguments)


class _Child:
    """The child of this process; a new one when the last one was ended."""

    def __init__(self, argv: list[str]) -> None:
        self._argv = argv
        self._process: subprocess.Popen[bytes] | None = None
        self._open = contextlib.ExitStack()
        self._known: dict[str, int] = {}

    def ask(self, name: str, jinja: str, *arguments: Any) -> Any:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        if jinja not in self._known and len(self._known) >= _KNOWN:
            self._known.clear()
        number = self._known.get(jinja, len(self._known))
        try:
            _send(process.stdin, [name, number, None if jinja in self._known else jinja, *arguments])
            self._known[jinja] = number
            answer = _receive(process.stdout)
        except (EOFError, OSError, ValueError) as error:
            if isinstance(error, ValueError):  # it says what no child of ours would
                process.kill()
            reason = limits.exceeded_by(process.wait()) or "it ended the process that it was run in"
            self.end()
            raise TemplateError(f"the chat template can't be used: {reason}") from None
        except BaseException:  # stopped in the middle: what comes next would be the answer to this
            process.kill()
            self.end()
            raise
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return answer["result"]

    def _start(self) -> subprocess.Popen[bytes]:
        self._known.clear()
        self._process = self._open.enter_context(local.piped(self._argv, {}))
        return self._process

    def end(self) -> None:
        self._process = None
        self._open.close()


_child = _Child(local.python(__name__))
_lock = threading.Lock()
atexit.register(lambda: _child.end())


def _send(stream: BinaryIO | Any, value: Any) -> None:
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> Any:
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    if size > _LARGEST:
        raise ValueError(size)
    data = stream.read(size)
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return json.loads(data)


def _main() -> None:
    from . import jinja

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limits.confine()
    _prepare(jinja)
    _give_up_files()
    known: dict[int, str] = {}
    while True:
        try:
            name, number, text, *arguments = _receive(questions)
        except EOFError:
            return
        if text is not None:
            known[number] = text
        try:
            answer = {"result": getattr(jinja, name)(known[number], *arguments)}
        except TemplateError as error:
            answer = {"error": error.cause}
        try:
            _send(answers, answer)
        except OSError:  # the parent is gone
            return


def _prepare(jinja: Any) -> None:
    """Has Python load now what it loads when it is first needed, as for texts in a template and for its faults."""
    for template in ("{{ 'a' | upper }}", "{% macro a(b) %}{{ b }}{% endmacro %}{{ a(raise_exception('')) }}", "{% %}"):
        with contextlib.suppress(TemplateError):
            jinja.render(template, [], None, {})


def _give_up_files() -> None:
    """From here on this process can open no file, write to none and start no process, whatever a template finds."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
        resource.setrlimit(what, (0, 0))


if __name__ == "__main__":
    _main()
