"""Checkpoints: adapter, optimizer and random state of one moment in one folder, whole or invisible.

A folder gets its name by a rename when its files are on the disk, and one file holds the hashes of the others: adapter
and optimizer can't come from different epochs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import checkpoint_files
from .checkpoint_files import ADAPTER, FACTS, STATE


@dataclass(frozen=True)
class RecipeState:
    """The state of a training after an epoch.

    Attributes:
        epoch: epochs done.
        step: steps done.
        adapter: weights under torchtune's names, in the dtype in which they are trained.
        optimizer: moments and step, by the name of the weight.
        random: states of the random generators that dropout uses, by device.
        halvings: steps at which memory ran out.
    """

    epoch: int
    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: dict[str, Tensor]
    halvings: list[int]


def save(root: Path, state: RecipeState, peft: dict[str, Tensor], identity: dict[str, object]) -> None:
    """Write a checkpoint.

    Args:
        root: the folder of all checkpoints.
        state: to resume from.
        peft: the same adapter under PEFT's names, fp32, for the driver.
        identity: the settings that a resumed training must share.
    """
    target = checkpoint_files.folder_of(root, state.epoch)
    partial = root / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"adapter|{name}": weight for name, weight in state.adapter.items()}
    for weight, values in state.optimizer.items():
        tensors |= {f"optimizer|{weight}|{name}": moment for name, moment in values.items()}
    tensors |= {f"random|{device}": generator for device, generator in state.random.items()}
    for file, content in ((ADAPTER, peft), (STATE, tensors)):
        on_cpu = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in content.items()}
        save_file(on_cpu, partial / file, metadata={"format": "pt"})
    facts = {
        "identity": identity,
        "epoch": state.epoch,
        "step": state.step,
        "halvings": state.halvings,
        "sha256": {file: checkpoint_files.hash_of(partial / file) for file in (ADAPTER, STATE)},
    }
    text = json.dumps(facts, indent=1)
    # The first line is the hash of the facts: a damaged setting must not be reported as a different setting.
    (partial / FACTS).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")
    for path in partial.iterdir():
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)  # a damaged one, or the driver would have resumed from it
    partial.rename(target)
    if os.name != "nt":  # Windows can't open folders; its rename is already ordered
        descriptor = os.open(root, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load(folder: Path) -> RecipeState:
    """Read what `save` wrote; `checkpoint_files` has checked the hashes."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8").partition("\n")[2])
    adapter: dict[str, Tensor] = {}
    optimizer: dict[str, dict[str, Tensor]] = {}
    random: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / STATE).items():
        kind, _, rest = name.partition("|")
        if kind == "adapter":
            adapter[rest] = tensor
        elif kind == "optimizer":
            weight, _, value = rest.partition("|")
            optimizer.setdefault(weight, {})[value] = tensor
        else:
            random[rest] = tensor
    return RecipeState(facts["epoch"], facts["step"], adapter, optimizer, random, facts.get("halvings", []))


def random_state() -> dict[str, Tensor]:
    """Return the states of the random generators that dropout uses."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
