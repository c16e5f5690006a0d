"""Run chat templates in a process that has nothing to lose.

A worker that prepares chats is already confined and renders in its own process. Every other process starts one child
of this module when it first needs it. The child has no files, starts no processes, and exchanges nothing but JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, cast

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import TemplateError
from kolotune.foundation.typed_storage import JsonObject
from kolotune.runners import limits, local, signals

from .signature import TemplateSignature

_MOST_BYTES = 1 << 30  # of a question or an answer
_MOST_TEMPLATES = 32  # that a child remembers by number


class Sandbox:
    """The confined child of this process; `argv` starts it when needed, and again after it was lost."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = list(argv)
        self._process: subprocess.Popen[bytes] | None = None
        self._open = contextlib.ExitStack()
        self._known: dict[str, int] = {}
        self._lock = threading.Lock()

    def ask(self, function: str, jinja: str, *arguments: object) -> object:
        """Call a function of the module `jinja` in the child.

        Raises:
            TemplateError: The function raised it, or the child was lost.
        """
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            if jinja not in self._known and len(self._known) >= _MOST_TEMPLATES:
                self._known.clear()
            number = self._known.get(jinja, len(self._known))
            try:
                _send(process.stdin, [function, number, None if jinja in self._known else jinja, *arguments])
                self._known[jinja] = number
                answer = _receive(process.stdout)
                if not isinstance(answer, dict):
                    raise ValueError(answer)
            except (EOFError, OSError, ValueError) as error:
                if isinstance(error, ValueError):  # no child of ours says this
                    process.kill()
                reason = limits.exceeded_by(process.wait()) or "it ended the process in which it ran"
                self.close()
                raise TemplateError(f"the chat template can't be used: {reason}") from None
            except BaseException:  # interrupted: the next answer would be that to this question
                process.kill()
                self.close()
                raise
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return answer["result"]

    def _start(self) -> subprocess.Popen[bytes]:
        self._known.clear()
        self._process = self._open.enter_context(local.piped(self.argv, {}))
        return self._process

    def close(self) -> None:
        """End the child."""
        self._process = None
        self._open.close()


shared = Sandbox(local.python(__name__))
"""The child that all templates of this process share."""
atexit.register(lambda: shared.close())


def uses_of_date(jinja: str) -> int:
    """Count ``strftime_now`` in the template's expressions.

    Raises:
        TemplateError: The template is not valid Jinja, or too expensive to parse.
    """
    return int(cast(int, _call("uses_of_date", jinja)))


def free_variables(jinja: str) -> list[str]:
    """Return the variables that the template may read before it has set them, functions left out, by name.

    Raises:
        TemplateError: The template is not valid Jinja, or too expensive to parse.
    """
    return list(map(str, cast(list[object], _call("free_variables", jinja))))


def inspects(jinja: str, name: str) -> bool:
    """Whether the template does more with a variable than ask whether it is true, loop over it and write it as JSON.

    Raises:
        TemplateError: The template is not valid Jinja, or too expensive to parse.
    """
    return bool(_call("inspects", jinja, name))


def extends(jinja: str, inner: str, names: Sequence[str]) -> bool:
    """Whether the template sets these variables, in this order, and then is `inner`, to the character that it writes.

    Raises:
        TemplateError: One of the templates is not valid Jinja, or too expensive to parse.
    """
    return bool(_call("extends", jinja, inner, list(names)))


def render(
    jinja: str,
    messages: Sequence[Mapping[str, object]],
    tools: Sequence[Mapping[str, object]] | None,
    variables: Mapping[str, object],
) -> str:
    """Render a chat; `jinja` is the template's source, `variables` its variables besides messages and tools.

    Raises:
        TemplateError: The template fails on these messages, or takes too much time, memory or space.
    """
    return str(_call("render", jinja, messages, tools, variables))


def signature(jinja: str, roles: Sequence[str], variables: Mapping[str, object]) -> TemplateSignature | None:
    """Return the template's signature for turns with these roles; None if what it writes depends on the texts.

    Raises:
        TemplateError: The template fails on these turns, or takes too much.
    """
    answer = _call("signature", jinja, roles, variables)
    if answer is None or isinstance(answer, TemplateSignature):
        return answer
    return typed_storage.convert(TemplateSignature, answer)


def _call(function: str, jinja: str, *arguments: object) -> object:
    """Call a function of the module `jinja`: here if this process is confined, else in the child."""
    if limits.is_confined():
        from . import jinja as module

        return getattr(module, function)(jinja, *arguments)
    return shared.ask(function, jinja, *arguments)


def _send(stream: IO[bytes], value: object) -> None:
    data = json.dumps(typed_storage.plain(value)).encode()
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> object:
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    if size > _MOST_BYTES:
        raise ValueError(size)
    data = stream.read(size)
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return typed_storage.parse_json(data)


def _main() -> None:
    from . import jinja

    signals.ignore_ctrl_c()
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    limits.confine()
    _load_lazy_parts()
    _give_up_files()
    known: dict[int, str] = {}
    while True:
        try:
            function, number, text, *arguments = cast(list[object], _receive(questions))
        except EOFError:
            return
        number = int(cast(int, number))
        if text is not None:
            known[number] = str(text)
        answer: JsonObject
        try:
            answer = {"result": typed_storage.plain(getattr(jinja, str(function))(known[number], *arguments))}
        except TemplateError as error:
            answer = {"error": error.cause}
        try:
            _send(answers, answer)
        except OSError:  # the parent is gone
            return


def _load_lazy_parts() -> None:
    """Make Python load now what it loads on first use, such as for texts in a template and for its errors."""
    from . import jinja

    for template in ("{{ 'a' | upper }}", "{% macro a(b) %}{{ b }}{% endmacro %}{{ a(raise_exception('')) }}", "{% %}"):
        with contextlib.suppress(TemplateError):
            jinja.render(template, [], None, {})


def _give_up_files() -> None:
    """Prevent this process from opening files, writing to files and starting processes, whatever a template does."""
    if sys.platform == "win32":
        return
    import resource

    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


if __name__ == "__main__":
    _main()
