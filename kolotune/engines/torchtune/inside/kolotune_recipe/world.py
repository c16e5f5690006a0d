"""The processes that train together: what one of them knows of the others."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

_PATIENCE = datetime.timedelta(minutes=10)  # for the slowest of the others, before one counts as gone
_SEED_STEPS = 1_000_003


class World:
    """One process of those that train together; also the only one. torchrun tells each its place.

    Attributes:
        rank, size: this process's number, from 0, and how many there are.
        writes: whether it writes files and tells events: the first of each machine, whose disk is its own.

    Args:
        device: "cpu" or "cuda".

    Raises:
        RuntimeError: there is no GPU for this process.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.writes = local == 0
        self._device = device
        if self.size == 1:
            return
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise RuntimeError(f"there are {torch.cuda.device_count()} GPUs, fewer than processes (--nproc)")
            torch.cuda.set_device(local)
        dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo", timeout=_PATIENCE)

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        return float(summed)

    def draw_for(self, seed: int, step: int) -> None:
        """Where several train together, random numbers of this step are its own and this process's own."""
        if self.size > 1:
            torch.manual_seed((seed * _SEED_STEPS + step) * self.size + self.rank)

    def newest(self, epoch: int | None, make: Callable[[], Any]) -> Any:
        """What `make()` gives on the process that is furthest, on every process; None where none has an epoch.

        Args:
            epoch: how far this process's own checkpoint is; None: it has none.
            make: gives an object that can be sent.
        """
        if self.size == 1:
            return None if epoch is None else make()
        epochs = self._of_all(epoch)
        furthest = max((each for each in epochs if each is not None), default=None)
        if furthest is None:
            return None
        source = epochs.index(furthest)
        sent = [make() if self.rank == source else None]
        dist.broadcast_object_list(sent, src=source)
        return sent[0]

    def longest(self, own: list[int]) -> list[int]:
        """The longest of the lists that the processes have."""
        return own if self.size == 1 else max(self._of_all(own), key=len)

    def differing(self, facts: Mapping[str, Any]) -> list[str]:
        """The names of the facts that are not the same in all processes."""
        if self.size == 1:
            return []
        return sorted({name for other in self._of_all(facts) for name in facts if other.get(name) != facts[name]})

    def _of_all(self, own: Any) -> list[Any]:
        """What each process gave, in their order."""
        collected: list[Any] = [None] * self.size
        dist.all_gather_object(collected, own)
        return collected
