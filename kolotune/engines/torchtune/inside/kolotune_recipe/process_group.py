"""The processes that train together, as one of them sees them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(minutes=10)  # for the slowest process, before it counts as lost
_SEED_STEPS = 1_000_003


class RecipeProcessGroup:
    """One process of those that train together, or the only one. torchrun sets the environment variables.

    Attributes:
        rank, size: this process's number, from 0, and the number of processes.
        writes: whether it writes files and reports events: the first process of each machine, for the machine's disk.

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
        dist.init_process_group("cuda:nccl,cpu:gloo" if device == "cuda" else "gloo", timeout=_TIMEOUT)

    def sum(self, value: float) -> float:
        """Return the sum over all processes."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        return float(summed)

    def seed_step(self, seed: int, step: int) -> None:
        """With several processes, seed the random numbers of a step, differently in each process."""
        if self.size > 1:
            torch.manual_seed((seed * _SEED_STEPS + step) * self.size + self.rank)

    def newest(self, epoch: int | None, load: Callable[[], T]) -> T | None:
        """Return what the process with the newest checkpoint loads, on every process; None where nobody has one.

        Args:
            epoch: of this process's newest checkpoint; None without one.
            load: loads it; the result is sent to the other processes.
        """
        if self.size == 1:
            return None if epoch is None else load()
        epochs = self._gather(epoch)
        newest = max((each for each in epochs if each is not None), default=None)
        if newest is None:
            return None
        source = epochs.index(newest)
        sent = [load() if self.rank == source else None]
        dist.broadcast_object_list(sent, src=source)
        return sent[0]

    def longest(self, own: list[int]) -> list[int]:
        """Return the longest of the processes' lists."""
        return own if self.size == 1 else max(self._gather(own), key=len)

    def differing(self, facts: Mapping[str, object]) -> list[str]:
        """Return the names of the facts that are not the same in all processes."""
        if self.size == 1:
            return []
        return sorted({name for other in self._gather(facts) for name in facts if other.get(name) != facts[name]})

    def _gather(self, own: T) -> list[T]:
        """Return each process's value, by rank."""
        collected: list[T] = [own] * self.size
        dist.all_gather_object(collected, own)
        return collected
