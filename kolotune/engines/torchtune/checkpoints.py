"""The checkpoints that the recipe wrote: which is the newest whole one, and which may go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.files import remove

from ..job import TrainJob
from .inside.kolotune_recipe import found

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, how many epochs and steps were done, and where memory had run out till then."""

    folder: Path
    epoch: int
    step: int
    halvings: list[int]

    def adapter(self) -> dict[str, Tensor]:
        """The adapter under PEFT's names, fp32."""
        from safetensors.torch import load_file

        return load_file(self.folder / found.ADAPTER)


def newest(job: TrainJob) -> Checkpoint | None:
    """The whole checkpoint with the highest number of epochs; None when there is none.

    Raises:
        TrainingError: it belongs to other data, another base or other settings.
    """
    there = found.newest(Path(job.checkpoints))
    if there is None:
        return None
    folder, facts = there
    job.require_same(facts["identity"], folder.name)
    return Checkpoint(folder, facts["epoch"], facts["step"], facts.get("halvings", []))


def prune(job: TrainJob) -> None:
    """Removes the oldest checkpoints, once the newest has been read back."""
    folders = found.by_epoch(Path(job.checkpoints))
    if not folders or found.whole(folders[0]) is None:
        return
    for old in folders[_KEPT:]:
        remove(old)


def clear(job: TrainJob) -> None:
    """Removes all checkpoints: a new training begins."""
    remove(Path(job.checkpoints))
