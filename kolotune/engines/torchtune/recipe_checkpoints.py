"""The checkpoints that the recipe wrote: the newest whole one, and removing old ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.files import remove

from ..job import TrainJob
from .inside.kolotune_recipe import checkpoint_files

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 2


@dataclass(frozen=True)
class RecipeCheckpoint:
    """A whole checkpoint.

    Attributes:
        folder: of the checkpoint.
        epoch, step: done when it was written.
        halvings: steps at which memory had run out.
    """

    folder: Path
    epoch: int
    step: int
    halvings: list[int]

    def adapter(self) -> dict[str, Tensor]:
        """Read the adapter: fp32, under PEFT's names."""
        from safetensors.torch import load_file

        return load_file(self.folder / checkpoint_files.ADAPTER)


def newest(job: TrainJob) -> RecipeCheckpoint | None:
    """Return the newest whole checkpoint; None when there is none.

    Raises:
        TrainingError: it belongs to other data, another base or other settings.
    """
    found = checkpoint_files.newest(Path(job.checkpoints))
    if found is None:
        return None
    folder, facts = found
    job.require_same(facts["identity"], folder.name)
    return RecipeCheckpoint(folder, facts["epoch"], facts["step"], facts.get("halvings", []))


def prune(job: TrainJob) -> None:
    """Remove old checkpoints, if the newest one is whole."""
    folders = checkpoint_files.by_epoch(Path(job.checkpoints))
    if not folders or checkpoint_files.facts_if_whole(folders[0]) is None:
        return
    for old in folders[_KEPT:]:
        remove(old)


def clear(job: TrainJob) -> None:
    """Remove all checkpoints, for a training from scratch."""
    remove(Path(job.checkpoints))
