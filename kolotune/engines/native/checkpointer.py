"""Checkpoints: everything that a training needs to resume bit for bit, whole or invisible.

Tensors are in the safetensors format of PyTorch's distributed checkpoint, which writes them where several processes
train. A single process writes the same format without it, because loading it takes longer than the steps of a short
training. Any number of processes can read either.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kolotune.foundation import typed_storage
from kolotune.foundation.files import remove, replacing
from kolotune.foundation.hashing import hash_file
from kolotune.foundation.typed_storage import JsonObject

from ..job import TrainJob

_KEPT = 2
TENSORS, _STATE = "model-00001-of-00001.safetensors", "state.json"
"""The files of a checkpoint; the first is named as PyTorch names it."""


@dataclass
class TrainingState:
    """The state of a training.

    Attributes:
        step: steps done.
        best_loss: the lowest held-out loss so far, None before the first evaluation; of preferences, that of the best
            accuracy.
        evaluations_since_best: evaluations since then.
        tensors: the adapter (PEFT's names), ``optimizer.*``, ``rng.*``, and ``best.*`` when a best one is kept.
        halvings: see `TrainJob`; each entry is the step that it counts from.
        best_accuracy: of preferences, the highest held-out accuracy so far.
    """

    step: int = 0
    best_loss: float | None = None
    evaluations_since_best: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    halvings: list[int] = field(default_factory=list)
    best_accuracy: float | None = None

    def is_better(self, loss: float, accuracy: float | None) -> bool:
        """Whether an evaluation is better than the best one so far; accuracy decides, and the loss among equals."""
        if self.best_loss is None:
            return True
        if accuracy is not None and self.best_accuracy is not None and accuracy != self.best_accuracy:
            return accuracy > self.best_accuracy
        return loss < self.best_loss

    def tensors_under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose name starts with `prefix`, by the rest of the name."""
        return {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}


def save(job: TrainJob, state: TrainingState) -> None:
    """Write a checkpoint; remove old ones once it has been read back."""
    folder = Path(job.checkpoints)
    target = folder / _name(state.step)
    with replacing(target) as partial:
        partial.mkdir(parents=True)
        _write({name: each.contiguous() for name, each in state.tensors.items()}, partial)
        facts: JsonObject = {
            "identity": job.identity(),
            "step": state.step,
            "best_loss": state.best_loss,
            "evaluations_since_best": state.evaluations_since_best,
            "halvings": state.halvings,
            "sha256": hash_file(partial / TENSORS),
        }
        if state.best_accuracy is not None:
            facts["best_accuracy"] = state.best_accuracy
        facts["of_these"] = _digest(facts)
        (partial / _STATE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if _facts_if_whole(target) is not None:
        for old in _by_step(folder)[_KEPT:]:
            remove(old)
        for unfinished in folder.glob(".step-*"):  # left over by a process that was killed
            remove(unfinished)


def _write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors to a file of `folder`.

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
            # Every process has all tensors, and each machine has its own disk: no process needs another one.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            state_dict_saver.save(dict(tensors), storage_writer=writer, no_dist=True)
    except CheckpointException as error:
        ((cause, _),) = error.failures.values()
        raise cause from error


def newest(job: TrainJob) -> TrainingState | None:
    """Return the newest whole checkpoint; None when there is none.

    Raises:
        TrainingError: it belongs to other data, another base or other settings.
    """
    for folder in _by_step(Path(job.checkpoints)):
        facts = _facts_if_whole(folder)
        if facts is None:
            continue
        job.require_same(facts.identity, folder.name)
        tensors = load_file(folder / TENSORS)
        counts = facts.step, facts.best_loss, facts.evaluations_since_best
        return TrainingState(*counts, tensors, facts.halvings, facts.best_accuracy)
    return None


def clear(job: TrainJob) -> None:
    """Remove all checkpoints, for a training from scratch."""
    remove(Path(job.checkpoints))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _by_step(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first, by the number in their name, never by time."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), key=lambda path: path.name, reverse=True)


@dataclass(frozen=True)
class _CheckpointFacts:
    """The facts beside a checkpoint's tensors."""

    identity: JsonObject
    step: int
    best_loss: float | None
    evaluations_since_best: int
    sha256: str
    halvings: list[int] = field(default_factory=list)
    best_accuracy: float | None = None


def _facts_if_whole(folder: Path) -> _CheckpointFacts | None:
    """Return the facts of a checkpoint if they and its tensors are what was written; None when it is damaged."""
    try:
        fields = typed_storage.read_object(folder / _STATE)
        if fields.pop("of_these") != _digest(fields):
            return None
        facts = typed_storage.convert(_CheckpointFacts, fields)
        whole = folder.name == _name(facts.step) and hash_file(folder / TENSORS) == facts.sha256
        return facts if whole and facts.identity else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def _digest(facts: JsonObject) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def random_state() -> dict[str, Tensor]:
    """Return the state of the random generators that dropout uses."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng.cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: TrainingState) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state.tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["rng.cuda"])
