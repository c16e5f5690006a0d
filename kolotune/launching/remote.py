"""Other machines that run commands for us: what they answer, and files there and back.

How a machine is reached (ssh, kubectl exec) is a function from a command to the arguments of a program here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError, LaunchError
from kolotune.foundation.files import Hasher
from kolotune.foundation.reporter import Reporter, parse_event
from kolotune.runners import local
from kolotune.runners.container import archive
from kolotune.runners.container.archive import Item
from kolotune.runners.container.paths import Paths
from kolotune.runners.container.transfer import Sender
from kolotune.version import VERSION

from .launcher import as_typed
from .node import MODULE

_INSIDE = "kolotune.runners.container.inside"


class Execute(Protocol):
    """Starts a program here."""

    def __call__(self, argv: Sequence[str], typed: Iterable[bytes] = (), what: str = "") -> Iterator[bytes]:
        """What the program writes, while `typed` goes into it; `what` says in words what that is."""


def really(argv: Sequence[str], typed: Iterable[bytes] = (), what: str = "") -> Iterator[bytes]:
    """The `Execute` that does it."""
    del what
    return local.stream(argv, typed)


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder on another machine, below which everything of ours lies.

    Attributes:
        name: of the machine, for messages.
        reach: makes of a command there the arguments of a program here.
        python: the interpreter there that has kolotune.
        root: the folder.
        execute: starts that program.
    """

    name: str
    reach: Callable[[Sequence[str]], list[str]]
    python: str
    root: PurePosixPath
    execute: Execute = really

    @property
    def inputs(self) -> PurePosixPath:
        """Where files are sent to, each into a folder of its own."""
        return self.root / ".inputs"

    def module(self, name: str, *arguments: str) -> list[str]:
        """The command that runs a module of kolotune's there."""
        return [self.python, "-P", "-m", name, *arguments]

    def told(self, argv: Sequence[str], typed: Iterable[bytes] = (), what: str = "") -> bytes:
        """What a command there writes.

        Raises:
            LaunchError: it failed, or the machine can't be reached; in its own words.
        """
        pieces: list[bytes] = []
        try:
            for piece in self.execute(self.reach(argv), typed, what):
                pieces.append(piece)
        except (local.ProgramError, OSError) as error:
            raise self._explained(error, b"".join(pieces)) from None
        return b"".join(pieces)

    def ask(self, command: str, *arguments: object) -> Any:
        """What `inside` answers there."""
        answer = self.told(self.module(_INSIDE, command, *map(str, arguments)))
        try:
            return json.loads(answer.splitlines()[-1])  # a shell's greeting may come before
        except (ValueError, IndexError):
            raise LaunchError(f"{self.name}: answered nothing that makes sense") from None

    def send(self, items: Iterable[Item], target: PurePosixPath) -> None:
        """Puts a folder of files at `target`, whole or not at all."""
        sent = list(items)
        partial = self.root / f".{uuid.uuid4().hex}.partial"
        try:
            self.told(["mkdir", "-p", "--", str(partial)])
            unpack = ["tar", "--extract", "--no-same-owner", "--file=-", f"--directory={partial}"]
            self.told(unpack, archive.packed(sent), f"a tar of {', '.join(each.name for each in sent)}")
            self.ask("settle", partial, target)
        except BaseException:
            with contextlib.suppress(KolotuneError):
                self.ask("remove", partial)
            raise

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        """Takes a file or folder out to `target`, which does not exist yet."""
        pack = ["tar", "--create", "--file=-", f"--directory={source.parent}", "--", source.name]
        try:
            archive.unpack(self.execute(self.reach(pack)), source.name, target)
        except (local.ProgramError, OSError) as error:
            raise self._explained(error) from None

    def _explained(self, error: local.ProgramError | OSError, said: bytes = b"") -> LaunchError:
        """A failure there in the words that were said there, by kolotune if it spoke."""
        for line in said.decode("utf-8", "replace").splitlines():
            event = parse_event(line)
            if event is not None and event.get("event") == "failure":
                return LaunchError(f"{self.name}: {event.get('cause', '')}", str(event.get("hint", "")))
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return LaunchError(f"{self.name}: {lines[-1] if lines else 'failed without a word'}")


class Rehearsal:
    """An `Execute` that does nothing: it notes each command, and answers as a machine would that has nothing yet.

    Args:
        answers: by a word of the command; where none fits, the answer is null.

    Attributes:
        steps: the commands, as they would be typed.
    """

    def __init__(self, answers: Mapping[str, bytes]) -> None:
        self._answers = answers
        self.steps: list[str] = []

    def __call__(self, argv: Sequence[str], typed: Iterable[bytes] = (), what: str = "") -> Iterator[bytes]:
        self.steps.append(as_typed(argv) + (f" < ({what})" if what else ""))
        words = " ".join(argv).split(" ")
        return iter([next((answer for word, answer in self._answers.items() if word in words), b"null\n")])


def arrived(place: Place) -> Place:
    """A machine with its folder as a whole path, if it has this very kolotune.

    Raises:
        LaunchError: it has none, or another one.
    """
    answer = place.told(place.module(MODULE, "about", str(place.root)))
    try:
        about = json.loads(answer.splitlines()[-1])  # a shell's greeting may come before
        version, root = str(about["version"]), PurePosixPath(about["root"])
    except (ValueError, IndexError, KeyError, TypeError):
        raise LaunchError(f"{place.name}: answered nothing that makes sense", "Is kolotune installed there?") from None
    if version != VERSION:
        raise LaunchError(
            f"{place.name}: has kolotune {version}, and here is {VERSION}", "Install one version on both."
        )
    return dataclasses.replace(place, root=root)


def sent_config(
    config: Config,
    place: Place,
    run: PurePosixPath,
    paths: Paths,
    reporter: Reporter,
    *,
    in_place: bool,
) -> tuple[PurePosixPath, str]:
    """Sends a run's chats, its base model and its options to a machine.

    Args:
        config: the options, with the paths of here.
        place: where to.
        run: the run folder there.
        paths: learns which path there stands for which here.
        reporter: told when it may take a while.
        in_place: chats and base model are named as they are there; only the options are sent.

    Returns:
        The file of options there, and its text.
    """
    import yaml

    sender = Sender(place, Hasher(), paths, reporter)
    values: dict[str, Any] = yaml.safe_load(configs.dump(config))
    if not in_place:
        for name in ("train_data", "eval_data"):
            values[name] = [str(sender.place(path)) for path in getattr(config, name)]
        if Path(config.base_model).is_absolute():
            values["base_model"] = str(sender.place(Path(config.base_model)))
    values["output_dir"] = str(run)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return sender.place_text("kolotune.yaml", text, Path("kolotune.yaml")), text
