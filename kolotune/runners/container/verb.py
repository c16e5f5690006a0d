"""A verb in the container: sent, listened to, and its results brought out."""

from __future__ import annotations

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.files import remove, replacing
from kolotune.foundation.reporter import Replay, Reporter, clean, parse_event
from kolotune.foundation.secrets import HUB_TOKEN, Secret
from kolotune.run_folder.layout import RunFolder

from ..watchdog import REPORT_PROCESS
from . import names
from .paths import Paths, deep
from .process import Process
from .transfer import Volume, bring_out

_KOLOTUNE = (names.PYTHON, "-P", "-m", "kolotune")


@dataclass
class Order:
    """A verb as it runs inside.

    Attributes:
        argv: the verb and its arguments, with the paths inside.
        run: the run folder on the host that the verb changes, and its folder inside; None: it changes none.
        out: a folder that the verb makes elsewhere, on the host and inside.
        paths: which path inside stands for which on the host.
        token: the hub's; an empty one for none. It goes into the process's environment and nowhere else.
        as_events: the verb answers in events; otherwise its output is shown as text.
        raw: show events as they come, one JSON object a line (the user's ``--json``).
        typed: standard input belongs to the verb (a chat).
    """

    argv: list[str]
    paths: Paths
    run: tuple[Path, PurePosixPath] | None = None
    out: tuple[Path, PurePosixPath] | None = None
    token: Secret = Secret()  # noqa: RUF009 - it never changes
    as_events: bool = True
    raw: bool = False
    typed: bool = False


def carry_out(
    volume: Volume, order: Order, reporter: Reporter, *, leave_inside: bool = False, with_checkpoints: bool = False
) -> int:
    """Runs the verb inside and brings out what it made, also when it failed or was interrupted.

    Returns:
        The verb's exit code.

    Raises:
        ContainerLostError: the container was stopped meanwhile.
        ContainerPausedError: it was paused, and still is.
        KolotuneError: the verb went well, and bringing its results out did not.
    """
    env = {REPORT_PROCESS: "1"}
    if order.token:
        env[HUB_TOKEN] = order.token.reveal()
    argv = [*_KOLOTUNE, *order.argv]
    typed = sys.stdin.buffer if order.typed else None
    process = Process(volume.docker, volume.found, argv, env=env, typed=typed, doing=order.argv[0], reporter=reporter)
    listener = _Listener(order, reporter, process)
    try:
        code = process.wait(listener)
    finally:
        listener.close()
    if not leave_inside:
        try:
            _bring_out(volume, order, reporter, with_checkpoints)
        except KolotuneError as error:
            if code == 0:
                raise
            reporter.warning(f"the records could not be brought out: {error.cause}")
    return code


def _bring_out(volume: Volume, order: Order, reporter: Reporter, with_checkpoints: bool) -> None:
    if order.run is not None:
        host, inside = order.run
        came = bring_out(volume, inside, RunFolder(host), order.paths, with_checkpoints=with_checkpoints)
        results = [name for name in came if not name.startswith(f"{RunFolder(host).state.name}/")]
        if results:
            reporter.note(f"brought out to {host}: {', '.join(results)}")
    if order.out is not None:
        host, inside = order.out
        if volume.ask("have", inside) == [True]:
            with replacing(host) as partial:
                remove(partial)
                volume.fetch(inside, partial)
            volume.ask("remove", inside.parent)
            reporter.note(f"brought out: {host}")


class _Listener:
    """Shows what comes out of the process, in lines or (for a chat) as it comes."""

    def __init__(self, order: Order, reporter: Reporter, process: Process) -> None:
        self._order, self._process, self._reporter = order, process, reporter
        self._replay = Replay(reporter)
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = (decoder("replace"), decoder("replace"))
        self._rest = ["", ""]

    def __call__(self, piece: bytes, is_stderr: bool) -> None:
        text = self._rest[is_stderr] + self._decoders[is_stderr].decode(piece)
        *lines, self._rest[is_stderr] = text.split("\n")
        for line in lines:
            self._line(line + "\n", is_stderr)
        if self._order.typed and not is_stderr and self._process.number and self._rest[False]:
            self._text(self._rest[False], is_stderr)  # an answer appears as it is made
            self._rest[False] = ""

    def close(self) -> None:
        """Shows what is left."""
        for is_stderr in (False, True):
            if self._rest[is_stderr]:
                self._line(self._rest[is_stderr], bool(is_stderr))
        self._rest = ["", ""]
        self._replay.close()

    def _line(self, line: str, is_stderr: bool) -> None:
        event = parse_event(line) if not is_stderr else None
        if event is not None and event.get("event") == "process" and not self._process.number:
            self._process.number = int(str(event["number"]))
        elif event is None or not self._order.as_events:
            self._text(line, is_stderr)
        elif self._order.raw:
            import json

            print(json.dumps(deep(event, self._order.paths.host)), flush=True)
        else:
            self._replay.show(deep(event, self._order.paths.host))

    def _text(self, text: str, is_stderr: bool) -> None:
        stream = sys.stderr if is_stderr else sys.stdout
        stream.write(clean(self._order.paths.host(text)))
        stream.flush()
