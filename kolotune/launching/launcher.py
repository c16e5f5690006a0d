"""What is launched, and what a launcher does with it: plan, submit, follow, fetch, cancel."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from kolotune.foundation.config import Config
from kolotune.foundation.errors import ConfigError, RunFolderError
from kolotune.foundation.files import write_json
from kolotune.foundation.reporter import PlainReporter, Reporter
from kolotune.run_folder.layout import RunFolder
from kolotune.runners.container.paths import Paths

MEETING_PORT = 29500
LATER = f"first-machine:{MEETING_PORT}"
"""Stands for `rdzv` in the options of a job until it is known where its machines meet."""
# Kubernetes names a machine after the job and its number, in at most 63 characters that a DNS label may have.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_.,:=+@/*\[\]-]*")
_LONGEST_SLUG = 30


@dataclass(frozen=True)
class Order:
    """A run as it is handed to a launcher.

    Attributes:
        config: its options, resolved here; its run folder is where results come to.
        name: of the job.
        hours: after which it is stopped.
        gpus, cpus, memory_gb: of each machine; None: what the scheduler gives.
        token_file: where the hub's token lies, as the job sees it; None: nowhere.
        in_place: chats and base model are named as the machines see them; nothing is sent.
        only_train: the run ends with its adapter.
    """

    config: Config
    name: str
    hours: float
    gpus: int | None = None
    cpus: int | None = None
    memory_gb: float | None = None
    token_file: str | None = None
    in_place: bool = False
    only_train: bool = False


@dataclass(frozen=True)
class Plan:
    """What would be done.

    Attributes:
        steps: in order, as they would be typed.
        files: names and texts of the files that are handed over.
    """

    steps: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Launched:
    """A submitted job, as the run folder remembers it.

    Attributes:
        on: the launcher's name.
        options: the launcher's own.
        job: its number or name.
        machines: how many.
        run: the run folder there.
        paths: which path there stands for which here.
    """

    on: str
    options: dict[str, Any]
    job: str
    machines: int
    run: str
    paths: tuple[tuple[str, str], ...] = ()

    def write(self, folder: RunFolder) -> None:
        """Keeps it in a run folder."""
        write_json(folder.launched, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: RunFolder) -> Launched:
        """What `write` kept.

        Raises:
            RunFolderError: nothing was launched into this folder.
        """
        try:
            loaded = json.loads(folder.launched.read_text(encoding="utf-8"))
            pairs = tuple((str(there), str(here)) for there, here in loaded.pop("paths"))
            return cls(**loaded, paths=pairs)
        except (OSError, ValueError, TypeError, KeyError):
            raise RunFolderError(
                f"{folder.root}: no job was launched into it", "kolotune launch --config FILE --on … --submit"
            ) from None


class Launcher(Protocol):
    """One kind of scheduler, with the user's settings for it. Its fields are kept in the run folder."""

    def plan(self, order: Order) -> Plan:
        """What `submit` would do; asks nobody.

        Raises:
            ConfigError: it can't be done like that.
        """

    def submit(self, order: Order, reporter: Reporter) -> Launched:
        """Sends what the job needs, and starts it.

        Raises:
            LaunchError: it was refused.
        """

    def follow(self, launched: Launched, reporter: Reporter) -> int:
        """Tells what the job tells until it ends; returns its exit code.

        Raises:
            LaunchError: the job was lost.
        """

    def fetch(self, launched: Launched, folder: RunFolder, reporter: Reporter) -> list[str]:
        """Brings the results into `folder`; returns the names of what came."""

    def cancel(self, launched: Launched, reporter: Reporter) -> None:
        """Stops the job."""


def name_for(folder: Path) -> str:
    """A job's name for a run folder, the same each time."""
    path = os.path.abspath(folder)
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(path).lower()).strip("-")[:_LONGEST_SLUG].strip("-") or "run"
    return f"kolotune-{slug}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def require_name(name: str) -> str:
    """`name`, if every scheduler takes it as a job's.

    Raises:
        ConfigError: it does not.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name: {name!r} can't be a job's name",
            "Small letters, digits and dashes, a letter first, at most 50 characters.",
        )
    return name


def require_word(option: str, value: str) -> str:
    """`value`, if it is a word that can be neither an option nor anything to a shell.

    Raises:
        ConfigError: it is not.
    """
    if not _WORD.fullmatch(value):
        raise ConfigError(
            f"{option}: {value!r} has characters that are not taken there",
            "Letters, digits, _.,:=+@/*-",
        )
    return value


def as_typed(argv: Sequence[str]) -> str:
    """A command as it would be typed."""
    return shlex.join(argv)


def paths_of(launched: Launched) -> Paths:
    """Which path there stands for which here."""
    paths = Paths()
    for there, here in launched.paths:
        paths.add(PurePosixPath(there), Path(here))
    return paths


def last_line(text: str) -> str:
    """The last line of what a program said that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason was given")


class Quiet(PlainReporter):
    """A reporter for what is only planned."""

    def _line(self, text: str) -> None:
        """Says nothing."""
