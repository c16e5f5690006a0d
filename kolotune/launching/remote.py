"""Folders on other machines: run commands there, and copy files there and back.

How a machine is reached (ssh, kubectl exec) is a function from a command there to the arguments of a program here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from kolotune.foundation import config as configs
from kolotune.foundation import typed_storage
from kolotune.foundation.config import Config, Kind, option_names
from kolotune.foundation.errors import KolotuneError, LaunchError
from kolotune.foundation.hashing import Hasher
from kolotune.foundation.reporter import Reporter, parse_event
from kolotune.runners import local
from kolotune.runners.container import archive
from kolotune.runners.container.archive import ArchiveFile
from kolotune.runners.container.inputs import InputSender
from kolotune.runners.container.path_map import PathMap
from kolotune.runners.container.volume import INSIDE_MODULE
from kolotune.version import VERSION

from .node import MODULE, About

T = TypeVar("T")


class Execute(Protocol):
    """Runs a program on this machine."""

    def __call__(self, argv: Sequence[str], stdin: Iterable[bytes] = (), label: str = "") -> Iterator[bytes]:
        """Yield the program's output, while `stdin` is written to it; `label` describes `stdin`."""


def execute(argv: Sequence[str], stdin: Iterable[bytes] = (), label: str = "") -> Iterator[bytes]:
    """The `Execute` that really runs the program."""
    del label
    return local.stream(argv, stdin)


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """A folder on another machine that contains everything of ours, a `FileStore`.

    Attributes:
        machine: its name, for messages.
        reach: turns a command there into the arguments of a program here.
        python: the interpreter there that has kolotune.
        root: the folder.
        execute: runs that program.
    """

    machine: str
    reach: Callable[[Sequence[str]], list[str]]
    python: str
    root: PurePosixPath
    execute: Execute = execute

    @property
    def inputs(self) -> PurePosixPath:
        return self.root / ".inputs"

    def module(self, name: str, *arguments: str) -> list[str]:
        """Return the command that runs a module of kolotune there."""
        return [self.python, "-P", "-m", name, *arguments]

    def run(self, argv: Sequence[str], stdin: Iterable[bytes] = (), label: str = "") -> bytes:
        """Run a command there; return its output.

        Raises:
            LaunchError: it failed, or the machine can't be reached; with that program's own message.
        """
        chunks: list[bytes] = []
        try:
            for chunk in self.execute(self.reach(argv), stdin, label):
                chunks.append(chunk)
        except (local.ProgramError, OSError) as error:
            raise self._launch_error(error, b"".join(chunks)) from None
        return b"".join(chunks)

    def ask(self, kind: type[T], command: str, *arguments: object) -> T:
        return self.answer_of(kind, self.module(INSIDE_MODULE, command, *map(str, arguments)))

    def answer_of(self, kind: type[T], argv: Sequence[str], hint: str = "") -> T:
        """Run a command there; return the JSON in its last line, which must be a `kind`.

        Raises:
            LaunchError: it failed, or answered something else.
        """
        lines = self.run(argv).splitlines()  # a shell's greeting may come before the answer
        try:
            return typed_storage.parse(kind, lines[-1] if lines else b"")
        except typed_storage.StorageError:
            raise LaunchError(f"{self.machine}: the answer can't be understood", hint) from None

    def send(self, files: Iterable[ArchiveFile], target: PurePosixPath) -> None:
        files = list(files)
        partial = self.root / f".{uuid.uuid4().hex}.partial"
        try:
            self.run(["mkdir", "-p", "--", str(partial)])
            unpack = ["tar", "--extract", "--no-same-owner", "--file=-", f"--directory={partial}"]
            self.run(unpack, archive.pack(files), f"a tar of {', '.join(file.name for file in files)}")
            self.ask(object, "settle", partial, target)
        except BaseException:
            with contextlib.suppress(KolotuneError):
                self.ask(object, "remove", partial)
            raise

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        pack = ["tar", "--create", "--file=-", f"--directory={source.parent}", "--", source.name]
        try:
            archive.unpack(self.execute(self.reach(pack)), source.name, target)
        except (local.ProgramError, OSError) as error:
            raise self._launch_error(error) from None

    def _launch_error(self, error: local.ProgramError | OSError, output: bytes = b"") -> LaunchError:
        """Return a failure there as an error, with the message of kolotune there if it printed one."""
        for line in output.decode("utf-8", "replace").splitlines():
            event = parse_event(line)
            if event is not None and event.get("event") == "failure":
                return LaunchError(f"{self.machine}: {event.get('cause', '')}", str(event.get("hint", "")))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return LaunchError(f"{self.machine}: {lines[-1] if lines else 'failed without a message'}")


class DryRun:
    """An `Execute` that runs nothing: it notes each command, and answers like a machine that has nothing yet.

    Args:
        answers: by a word of the command; any other command is answered with null.

    Attributes:
        steps: the commands, as they would be typed.
    """

    def __init__(self, answers: Mapping[str, bytes]) -> None:
        self._answers = answers
        self.steps: list[str] = []

    def __call__(self, argv: Sequence[str], stdin: Iterable[bytes] = (), label: str = "") -> Iterator[bytes]:
        self.steps.append(shlex.join(argv) + (f" < ({label})" if label else ""))
        words = " ".join(argv).split(" ")
        return iter([next((answer for word, answer in self._answers.items() if word in words), b"null\n")])


def connect(folder: RemoteFolder) -> RemoteFolder:
    """Return a remote folder with its absolute path, if the machine has the same kolotune.

    Raises:
        LaunchError: it has none, or another version.
    """
    argv = folder.module(MODULE, "about", str(folder.root))
    about = folder.answer_of(About, argv, "Is kolotune installed there?")
    if about.version != VERSION:
        raise LaunchError(
            f"{folder.machine}: has kolotune {about.version}, and here is {VERSION}", "Install one version on both."
        )
    return dataclasses.replace(folder, root=PurePosixPath(about.root))


@dataclasses.dataclass(frozen=True)
class SentConfig:
    """A file of options on another machine, and its text."""

    path: PurePosixPath
    text: str


def send_inputs(
    config: Config, folder: RemoteFolder, run: PurePosixPath, paths: PathMap, reporter: Reporter, *, in_place: bool
) -> SentConfig:
    """Send a run's chats, base model and options to another machine.

    Args:
        config: the options, with the paths here.
        folder: the destination.
        run: the run folder there.
        paths: gets a pair for each file that is sent.
        reporter: shows that a large file is on its way.
        in_place: chats and base model are already there, under these paths; send only the options.

    Returns:
        The file of options there.
    """
    import yaml

    sender = InputSender(folder, Hasher(), paths, reporter)
    values = yaml.safe_load(configs.dump(config))
    if not in_place:
        for name in option_names(kind=Kind.CHAT_FILES):
            values[name] = [str(sender.send(path)) for path in getattr(config, name)]
        for name in (*option_names(kind=Kind.FILE), *option_names(kind=Kind.ADAPTER)):
            if (path := getattr(config, name)) is not None:
                values[name] = str(sender.send(path))
        if Path(config.base_model).is_absolute():
            values["base_model"] = str(sender.send(Path(config.base_model)))
    values["output_dir"] = str(run)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return SentConfig(sender.send_text("kolotune.yaml", text, Path("kolotune.yaml")), text)
