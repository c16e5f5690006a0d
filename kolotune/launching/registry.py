"""The launchers by name, and the one that launched a given run folder's job."""

from __future__ import annotations

from typing import cast

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import LaunchError
from kolotune.run_folder.layout import RunFolder

from . import slurm
from .kubernetes import Kubernetes
from .launcher import LaunchedJob, Launcher
from .slurm import Slurm
from .ssh import Ssh

LAUNCHERS: dict[str, type] = {slurm.CLUSTER: Slurm, slurm.HERE: Slurm, Kubernetes.NAME: Kubernetes, Ssh.NAME: Ssh}


def launched_job(folder: RunFolder) -> tuple[Launcher, LaunchedJob]:
    """Return the job that was launched from a run folder, with its launcher.

    Raises:
        RunFolderError: no job was launched.
        LaunchError: this version does not know the launcher, or its options.
    """
    job = LaunchedJob.read(folder)
    if job.on not in LAUNCHERS:
        raise LaunchError(
            f"{folder.launched}: the job was launched with {job.on!r}, which this version of kolotune does not know",
            f"Known are {', '.join(LAUNCHERS)}. Use the version that launched it.",
        )
    try:
        return cast(Launcher, typed_storage.convert(LAUNCHERS[job.on], job.options)), job
    except typed_storage.StorageError as error:
        raise LaunchError(
            f"{folder.launched}: options of {job.on}: {error}", "Use the version of kolotune that launched the job."
        ) from None
