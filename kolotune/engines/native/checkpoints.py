"""Checkpoints: everything that training needs to go on bit for bit, whole or invisible.

Their tensors are in the safetensors form of PyTorch's distributed checkpoint, which writes them where several processes
train. One process alone writes the same form without it, since only to load it takes longer than a short training's
steps; who reads one reads the other, with any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kolotune.foundation.files import remove, replacing
from kolotune.foundation.hashing import hash_file

from ..job import TrainJob

_KEPT = 2
TENSORS, _STATE = "model-00001-of-00001.safetensors", "state.json"
"""The files of a checkpoint; the first is named as PyTorch names it."""


@dataclass
class State:
    """Where a training stands.

    Attributes:
        step: steps done.
        best_loss: the lowest held-out loss so far, None before the first evaluation.
        evaluations_since_best: evaluations since then.
        tensors: the adapter (PEFT's names), ``optimizer.*``, ``rng.*``, and ``best.*`` when a best one is kept.
        halvings: see `TrainJob`; where each one counts from is known.
    """

    step: int = 0
    best_loss: float | None = None
    evaluations_since_best: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    halvings: list[int] = field(default_factory=list)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name begins with `prefix`, without it."""
        return {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}


def save(job: TrainJob, state: State) -> None:
    """Writes a checkpoint, and removes the oldest ones only after it has been read back."""
    folder = Path(job.checkpoints)
    target = folder / _name(state.step)
    with replacing(target) as partial:
        partial.mkdir(parents=True)
        _write({name: each.contiguous() for name, each in state.tensors.items()}, partial)
        facts = {
            "identity": job.identity(),
            "step": state.step,
            "best_loss": state.best_loss,
            "evaluations_since_best": state.evaluations_since_best,
            "halvings": state.halvings,
            "sha256": hash_file(partial / TENSORS),
        }
        facts["of_these"] = _digest(facts)
        (partial / _STATE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if _whole(target) is not None:
        for old in _by_step(folder)[_KEPT:]:
            remove(old)
        for unfinished in folder.glob(".step-*"):  # what a process that was ended left behind
            remove(unfinished)


def _write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """The tensors as a file of `folder`.

    Raises:
        OSError: it can't be written.
    """
    if not (dist.is_available() and dist.is_initialized()):
        save_file(dict(tensors), folder / TENSORS)
        return
    from torch.distributed.checkpoint import state_dict_saver  # 0.7 s
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder))
    try:
        with warnings.catch_warnings():
            # Each machine has a disk of its own, and each process has all of it: nobody else is asked, on purpose.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save(dict(tensors), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        ((cause, _),) = error.failures.values()
        raise cause from error


def newest(job: TrainJob) -> State | None:
    """The newest whole checkpoint; None when there is none.

    Raises:
        TrainingError: it belongs to other data, another base or other settings.
    """
    for folder in _by_step(Path(job.checkpoints)):
        facts = _whole(folder)
        if facts is None:
            continue
        job.require_same(facts["identity"], folder.name)
        tensors = load_file(folder / TENSORS)
        place = (facts["step"], facts["best_loss"], facts["evaluations_since_best"])
        return State(*place, tensors, facts.get("halvings", []))
    return None


def clear(job: TrainJob) -> None:
    """Removes all checkpoints: a new training begins."""
    remove(Path(job.checkpoints))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _by_step(folder: Path) -> list[Path]:
    """The checkpoints, newest first; by the number in their name, never by time."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), key=lambda path: path.name, reverse=True)


def _whole(folder: Path) -> dict[str, Any] | None:
    """The facts of a checkpoint which, as its tensors, are what was written at its step; None when it is damaged."""
    try:
        facts: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        if facts.pop("of_these") != _digest(facts):
            return None
        whole = folder.name == _name(facts["step"]) and hash_file(folder / TENSORS) == facts["sha256"]
        return facts if whole and facts["identity"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def random_state() -> dict[str, Tensor]:
    """The state of the random generators that dropout draws from."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: State) -> None:
    """Puts back what `random_state` saved."""
    torch.set_rng_state(state.tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["rng.cuda"])
