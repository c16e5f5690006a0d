"""Run a verb in the container: start it, show its messages, and fetch its results."""

from __future__ import annotations

import codecs
import json
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
from .path_map import PathMap
from .process import ContainerProcess
from .results import fetch_run
from .volume import Volume, exists

_KOLOTUNE = (names.PYTHON, "-P", "-m", "kolotune")


@dataclass
class ContainerVerb:
    """A verb as it runs inside.

    Attributes:
        argv: the verb and its arguments, with the paths inside.
        paths: which path inside stands for which on the host.
        run: the run folder on the host that the verb changes, and its folder inside; None when it changes none.
        out: a folder that the verb makes elsewhere, on the host and inside.
        token: the hub's token, or an empty one. It goes into the process's environment and nowhere else.
        as_events: the verb reports in events; otherwise its output is shown as text.
        raw: show events unchanged, one JSON object a line (the user's ``--json``).
        takes_input: standard input belongs to the verb (a chat).
    """

    argv: list[str]
    paths: PathMap
    run: tuple[Path, PurePosixPath] | None = None
    out: tuple[Path, PurePosixPath] | None = None
    token: Secret = Secret()  # noqa: RUF009 - it never changes
    as_events: bool = True
    raw: bool = False
    takes_input: bool = False


def run_verb(
    volume: Volume,
    verb: ContainerVerb,
    reporter: Reporter,
    *,
    leave_inside: bool = False,
    with_checkpoints: bool = False,
) -> int:
    """Run the verb inside and fetch its results, also when it failed or was interrupted.

    Returns:
        The verb's exit code.

    Raises:
        ContainerLostError: the container was stopped meanwhile.
        ContainerPausedError: it was paused, and still is.
        KolotuneError: the verb succeeded, but its results could not be fetched.
    """
    env = {REPORT_PROCESS: "1"}
    if verb.token:
        env[HUB_TOKEN] = verb.token.reveal()
    process = ContainerProcess(
        volume.docker,
        volume.container,
        [*_KOLOTUNE, *verb.argv],
        env=env,
        stdin=sys.stdin.buffer if verb.takes_input else None,
        doing=verb.argv[0],
        reporter=reporter,
    )
    output = _VerbOutput(verb, reporter, process)
    try:
        code = process.wait(output)
    finally:
        output.close()
    if not leave_inside:
        try:
            _fetch_results(volume, verb, reporter, with_checkpoints)
        except KolotuneError as error:
            if code == 0:
                raise
            reporter.warning(f"the records could not be fetched: {error.cause}")
    return code


def _fetch_results(volume: Volume, verb: ContainerVerb, reporter: Reporter, with_checkpoints: bool) -> None:
    if verb.run is not None:
        host, inside = verb.run
        changed = fetch_run(volume, inside, RunFolder(host), verb.paths, with_checkpoints=with_checkpoints)
        results = [name for name in changed if not name.startswith(f"{RunFolder(host).state.name}/")]
        if results:
            reporter.note(f"fetched to {host}: {', '.join(results)}")
    if verb.out is not None:
        host, inside = verb.out
        if exists(volume, inside):
            with replacing(host) as partial:
                remove(partial)
                volume.fetch(inside, partial)
            volume.ask(type(None), "remove", inside.parent)
            reporter.note(f"fetched: {host}")


class _VerbOutput:
    """Shows the output of the process: line by line, or for a chat as it arrives."""

    def __init__(self, verb: ContainerVerb, reporter: Reporter, process: ContainerProcess) -> None:
        self._verb, self._process, self._reporter = verb, process, reporter
        self._replay = Replay(reporter)
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = (decoder("replace"), decoder("replace"))
        self._rest = ["", ""]

    def __call__(self, chunk: bytes, is_stderr: bool) -> None:
        text = self._rest[is_stderr] + self._decoders[is_stderr].decode(chunk)
        *lines, self._rest[is_stderr] = text.split("\n")
        for line in lines:
            self._show_line(line + "\n", is_stderr)
        if self._verb.takes_input and not is_stderr and self._process.number and self._rest[False]:
            self._show_text(self._rest[False], is_stderr)  # an answer appears while it is generated
            self._rest[False] = ""

    def close(self) -> None:
        """Show the rest."""
        for is_stderr in (False, True):
            if self._rest[is_stderr]:
                self._show_line(self._rest[is_stderr], is_stderr)
        self._rest = ["", ""]
        self._replay.close()

    def _show_line(self, line: str, is_stderr: bool) -> None:
        event = parse_event(line) if not is_stderr else None
        if event is not None and event.get("event") == "process" and not self._process.number:
            self._process.number = int(str(event["number"]))
        elif event is None or not self._verb.as_events:
            self._show_text(line, is_stderr)
        elif self._verb.raw:
            print(json.dumps(self._verb.paths.event_to_host(event)), flush=True)
        else:
            self._replay.show(self._verb.paths.event_to_host(event))

    def _show_text(self, text: str, is_stderr: bool) -> None:
        stream = sys.stderr if is_stderr else sys.stdout
        stream.write(clean(self._verb.paths.to_host(text)))
        stream.flush()
