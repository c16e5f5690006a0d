"""Processes of our own that do one task: how they report, and how their errors come back as errors of the tree.

Work that needs much memory, or that a library may abort, runs in a child: a module with a ``main`` that calls
`carry_out`. It answers in events, lines of JSON on its standard output; everything else that it prints goes to a log.
The parent calls `run`, gets the events, and sees the child's `KolotuneError` raised again as the same class.
"""

from __future__ import annotations

import json
import signal
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from kolotune.foundation import errors, typed_storage
from kolotune.foundation.errors import KolotuneError, ToolchainError
from kolotune.foundation.typed_storage import JsonObject

from . import local
from .watchdog import end_with_parent

EventHandler = Callable[[str, JsonObject], None]
"""Called with an event's name and its fields."""
# Of a child that a signal ended, and what Windows says.
_ILLEGAL_INSTRUCTION = (-signal.SIGILL, 0xC000001D)
_PREFIX = '{"event": '


def emit(event: str, **fields: object) -> None:
    """Report an event to the parent process."""
    print(json.dumps({"event": event, **fields}), flush=True)


def emit_error(error: KolotuneError) -> None:
    """Report an error of the tree to the parent, which raises it again."""
    emit("error", kind=type(error).__name__, cause=error.cause, hint=error.hint)


def carry_out(task: Callable[[], object]) -> int:
    """Do a child's task; return its exit code.

    The process ends when its parent is gone. A `KolotuneError` is reported to the parent, with its traceback in the
    log; any other exception is a bug and goes its usual way.
    """
    end_with_parent()
    try:
        task()
    except KolotuneError as error:
        traceback.print_exc()
        emit_error(error)
        return error.exit_code
    return 0


def event_in(line: str) -> tuple[str, JsonObject] | None:
    """The event in a line of a child's output, as name and fields; None when the line is something else."""
    if not line.startswith(_PREFIX):
        return None
    try:
        fields = typed_storage.parse_object(line)
    except typed_storage.StorageError:
        return None
    return str(fields.pop("event")), fields


def error_in(fields: JsonObject, otherwise: type[KolotuneError]) -> KolotuneError:
    """The error that an ``error`` event reports; of class `otherwise` when its own is unknown here."""
    kind = getattr(errors, str(fields.get("kind")), None)
    known = isinstance(kind, type) and issubclass(kind, KolotuneError)
    raised: type[KolotuneError] = kind if known else otherwise  # type: ignore[assignment]
    return raised(str(fields.get("cause", "")), str(fields.get("hint", "")))


def run(
    module: str,
    *arguments: str,
    log: Path,
    otherwise: type[KolotuneError],
    on_event: EventHandler | None = None,
    env: Mapping[str, str] | None = None,
    ends_at_error: bool = False,
) -> int:
    """Run a module of ours to its end.

    Args:
        module, arguments: what ``python -m`` is given.
        log: file that the rest of its output is appended to.
        otherwise: class of an error that this version does not know.
        on_event: called for each event but ``error``; what it raises ends the child.
        env: variables set for the child.
        ends_at_error: end the child at its first error, rather than wait for its end.

    Returns:
        The exit code of a child that reported no error; negative when a signal ended it. What another code than 0
        means is for the caller to say.

    Raises:
        KolotuneError: the error that the child reported.
        ToolchainError: a library in it was built for another processor.
        SpaceError: the disk is full.
    """
    reported: list[KolotuneError] = []

    def on_line(line: str) -> bool:
        event = event_in(line)
        if event is None:
            return False
        name, fields = event
        if name == "error":
            reported.append(error_in(fields, otherwise))
            if ends_at_error:
                raise reported[0]
        elif on_event is not None:
            on_event(name, fields)
        return True

    code = local.run(local.python(module, *arguments), log=log, env=env, on_line=on_line, ends_with_parent=True)
    if reported:
        raise reported[0]
    if code in _ILLEGAL_INSTRUCTION:
        raise ToolchainError(
            f"{module} used an instruction that this processor does not have: a library was built for another one",
            f"The log is {log}. If it is llama.cpp, use one that is built for this machine: README.md, section Limits.",
        )
    return code
