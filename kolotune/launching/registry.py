"""The job that was launched from a run folder, and the launcher that did it."""

from __future__ import annotations

from typing import Any

from kolotune.run_folder.layout import RunFolder

from .kubernetes import Kubernetes
from .launcher import Launched, Launcher
from .slurm import Slurm
from .ssh import Ssh


def again(folder: RunFolder) -> tuple[Launcher, Launched]:
    """The launcher as it was, and the job.

    Raises:
        RunFolderError: nothing was launched into this folder.
    """
    launched = Launched.read(folder)
    kind: Any = {Ssh.NAME: Ssh, Kubernetes.NAME: Kubernetes}.get(launched.on, Slurm)
    lists = {name: tuple(value) for name, value in launched.options.items() if isinstance(value, list)}
    return kind(**(launched.options | lists)), launched
