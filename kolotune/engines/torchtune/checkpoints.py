"""The checkpoints that the recipe wrote: which is the newest whole one, and which may go."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import hash_file, remove
from ..job import TrainJob

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 2
_FACTS, _ADAPTER = "checkpoint.txt", "adapter_model.safetensors"


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

        return load_file(self.folder / _ADAPTER)


def newest(job: TrainJob) -> Checkpoint | None:
    """The whole checkpoint with the highest number of epochs; None when there is none.

    Raises:
        TrainingError: it belongs to other data, another base or other settings.
    """
    for folder in _by_epoch(Path(job.checkpoints)):
        facts = _whole(folder)
        if facts is None:
            continue
        job.require_same(facts["identity"], folder.name)
        return Checkpoint(folder, facts["epoch"], facts["step"], facts.get("halvings", []))
    return None


def prune(job: TrainJob) -> None:
    """Removes the oldest checkpoints, once the newest has been read back."""
    root = Path(job.checkpoints)
    folders = _by_epoch(root)
    if not folders or _whole(folders[0]) is None:
        return
    for old in folders[_KEPT:]:
        remove(old)


def clear(job: TrainJob) -> None:
    """Removes all checkpoints: a new training begins."""
    remove(Path(job.checkpoints))


def _by_epoch(root: Path) -> list[Path]:
    """The checkpoints, newest first; by the number in their name, never by time."""
    if not root.is_dir():
        return []
    found = [path for path in root.glob("epoch-*") if path.is_dir() and path.name.removeprefix("epoch-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("epoch-")), reverse=True)


def _whole(folder: Path) -> dict[str, Any] | None:
    """The facts of a checkpoint whose files are those that were written together; None when it is damaged."""
    try:
        digest_of_facts, _, text = (folder / _FACTS).read_text(encoding="utf-8").partition("\n")
        if hashlib.sha256(text.encode()).hexdigest() != digest_of_facts:
            return None
        facts: dict[str, Any] = json.loads(text)
        same = all(hash_file(folder / name) == digest for name, digest in facts["sha256"].items())
        proper = len(facts["sha256"]) == 2 and _ADAPTER in facts["sha256"] and isinstance(facts["identity"], dict)
        numbers = isinstance(facts["step"], int) and folder.name == f"epoch-{facts['epoch']:06d}"
        return facts if same and proper and numbers else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
