"""The `Launcher` protocol, and what goes in and out of a launcher: a job's spec, its plan, and the launched job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from kolotune.foundation import typed_storage
from kolotune.foundation.config import Config
from kolotune.foundation.errors import RunFolderError
from kolotune.foundation.reporter import Reporter
from kolotune.foundation.typed_storage import JsonObject
from kolotune.run_folder.layout import RunFolder
from kolotune.runners.container.path_map import PathMap

MEETING_PORT = 29500
LATER = f"first-machine:{MEETING_PORT}"
"""Stands for `rdzv` in the options of a job until the launcher knows where its machines meet."""


@dataclass(frozen=True)
class JobSpec:
    """A run to launch.

    Attributes:
        config: its options, resolved here; its run folder receives the results.
        name: of the job.
        hours: the time limit.
        gpus, cpus, memory_gb: of each machine; None: the scheduler's default.
        token_file: path of the file with the hub's token, as the job sees it; None: the job has no token.
        in_place: chats and base model are already on the machines, under these paths; only the options are sent.
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
class LaunchPlan:
    """What `Launcher.submit` would do.

    Attributes:
        steps: commands in order, as they would be typed.
        files: names and texts of the files that are submitted.
    """

    steps: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LaunchedJob:
    """A submitted job, as it is recorded in the run folder.

    Attributes:
        on: the launcher's name.
        options: the launcher's fields.
        job: the scheduler's number or name for it.
        machines: how many.
        run: the run folder there.
        paths: pairs of a path there and the path here that it stands for.
    """

    on: str
    options: JsonObject
    job: str
    machines: int
    run: str
    paths: tuple[tuple[str, str], ...] = ()

    def write(self, folder: RunFolder) -> None:
        """Record the job in a run folder."""
        typed_storage.write(folder.launched, self)

    @classmethod
    def read(cls, folder: RunFolder) -> LaunchedJob:
        """Read the job that was launched from a run folder.

        Raises:
            RunFolderError: there is none.
        """
        try:
            return typed_storage.read(cls, folder.launched)
        except (OSError, typed_storage.StorageError):
            raise RunFolderError(
                f"{folder.root}: no job was launched from this folder", "kolotune launch --config FILE --on … --submit"
            ) from None

    def path_map(self) -> PathMap:
        """Return which path there stands for which path here."""
        paths = PathMap()
        for there, here in self.paths:
            paths.add(PurePosixPath(there), Path(here))
        return paths


class Launcher(Protocol):
    """One kind of scheduler with the user's settings for it: a dataclass whose fields are `LaunchedJob.options`."""

    def plan(self, spec: JobSpec) -> LaunchPlan:
        """Return what `submit` would do, without contacting anything.

        Raises:
            ConfigError: the job is not possible.
        """

    def submit(self, spec: JobSpec, reporter: Reporter) -> LaunchedJob:
        """Send what the job needs, and start it.

        Raises:
            LaunchError: it was refused.
        """

    def follow(self, job: LaunchedJob, reporter: Reporter) -> int:
        """Show the job's messages until it ends; return its exit code.

        Raises:
            LaunchError: the job was lost.
        """

    def fetch(self, job: LaunchedJob, folder: RunFolder, reporter: Reporter) -> list[str]:
        """Copy the results to `folder`; return the names of what has changed."""

    def cancel(self, job: LaunchedJob, reporter: Reporter) -> None:
        """Stop the job."""
