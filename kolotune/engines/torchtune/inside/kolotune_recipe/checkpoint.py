"""Checkpoints: adapter, optimizer and random state of one moment in one folder, whole or invisible.

A folder gets its name by a rename when everything in it is on the disk, and the hashes of its files stand in it
together: an adapter can't be taken for that of another epoch than its optimizer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import found
from .found import ADAPTER, FACTS, STATE


@dataclass(frozen=True)
class State:
    """Where a training stands after an epoch.

    Attributes:
        epoch: epochs done.
        step: steps done.
        adapter: weights under torchtune's names, in the dtype they are trained in.
        optimizer: moments and step by the name of the weight they belong to.
        random: the states of the generators that dropout draws from, by device.
        halvings: the steps at which memory ran out.
    """

    epoch: int
    step: int
    adapter: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: dict[str, Tensor]
    halvings: list[int]


def save(root: Path, state: State, peft: dict[str, Tensor], identity: dict[str, Any]) -> None:
    """Writes a checkpoint below `root`.

    Args:
        root: the folder of all checkpoints.
        state: to go on from.
        peft: the same adapter under PEFT's names, fp32, for who takes the adapter out.
        identity: the settings that a training which goes on must share.
    """
    target = found.folder_of(root, state.epoch)
    partial = root / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"adapter|{name}": each for name, each in state.adapter.items()}
    for weight, values in state.optimizer.items():
        tensors |= {f"optimizer|{weight}|{name}": each for name, each in values.items()}
    tensors |= {f"random|{device}": each for device, each in state.random.items()}
    for file, content in ((ADAPTER, peft), (STATE, tensors)):
        on_cpu = {name: each.detach().to("cpu", copy=True).contiguous() for name, each in content.items()}
        save_file(on_cpu, partial / file, metadata={"format": "pt"})
    facts = {
        "identity": identity,
        "epoch": state.epoch,
        "step": state.step,
        "halvings": state.halvings,
        "sha256": {file: found.hash_of(partial / file) for file in (ADAPTER, STATE)},
    }
    text = json.dumps(facts, indent=1)
    # The facts' own hash stands before them: a damaged setting must not be told as another setting.
    (partial / FACTS).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}", encoding="utf-8")
    for path in partial.iterdir():
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)  # one that was not whole, or the driver would have gone on from it
    partial.rename(target)
    if os.name != "nt":  # Windows can't open folders; its rename is already ordered
        descriptor = os.open(root, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def load(folder: Path) -> State:
    """What `save` wrote; the driver has checked the hashes."""
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
    return State(facts["epoch"], facts["step"], adapter, optimizer, random, facts.get("halvings", []))


def random_state() -> dict[str, Tensor]:
    """The states of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Puts back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
