"""The processes that train together: data parallel, each with the whole base and a share of every step's chats.

A step's loss is a sum over its chats divided by its labels, so the gradients of shares add up to the gradient of the
step, for any number of processes; only the last bits depend on the split. Only the adapters' gradients are sent.
torchrun starts the processes and sets their environment variables.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from kolotune.foundation.errors import TrainingError

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(minutes=10)  # for the slowest process, before it counts as lost
_SEED_STEPS = 1_000_003


class ProcessGroup:
    """One process of those that train together, or the only one.

    Attributes:
        rank, size: this process's number, from 0, and the number of processes.
        local: its number among the processes of its machine.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda" and self.size > 1:
            torch.cuda.set_device(self.local)
        self._device = device
        if self.size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)

    @property
    def writes(self) -> bool:
        """Whether this process writes files and reports events: the first of each machine, for the machine's disk."""
        return self.local == 0

    def close(self) -> None:
        """Leave the group once all processes are done.

        A process that leaves first may cut the connection before the others have heard of it. By then all results are
        written, so that is no failure: torchrun would restart all processes for it.
        """
        if self.size > 1:
            with contextlib.suppress(RuntimeError):
                dist.barrier()
                dist.destroy_process_group()

    def share(self, indices: Sequence[int], costs: Mapping[int, float]) -> list[int]:
        """Return this process's share of the chats `indices`, in their order.

        The costliest chat comes first; each goes to the process with least to do (Graham's rule, at most 4/3 of the
        optimum).

        Args:
            indices: of the step.
            costs: of each chat, in any unit; a single process does not need them.
        """
        if self.size == 1:
            return list(indices)
        loads, parts = [0.0] * self.size, {}
        for index in sorted(indices, key=lambda each: (-costs[each], each)):
            to = loads.index(min(loads))
            loads[to] += costs[index]
            parts[index] = to
        return [index for index in indices if parts[index] == self.rank]

    def sum_gradients(self, gradient: Tensor) -> None:
        """Replace a gradient by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(gradient)

    def copy_first(self, value: Tensor) -> None:
        """Replace a tensor by that of the first process."""
        if self.size > 1:
            dist.broadcast(value, src=0)

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of ``value []`` over all processes, which may replace it."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def pad_groups(self, groups: list[list[int]], filler: list[int]) -> list[tuple[list[int], float]]:
        """Return this process's groups with factor 1, and fillers with factor 0 up to the largest number.

        For models of which all processes compute each group together.
        """
        most = torch.tensor(len(groups), device=self._device)
        if self.size > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [(group, 1.0) for group in groups] + [(filler, 0.0)] * (int(most) - len(groups))

    def seed_step(self, seed: int, step: int) -> None:
        """With several processes, seed the random numbers of a step, differently in each process."""
        if self.size > 1:
            torch.manual_seed((seed * _SEED_STEPS + step) * self.size + self.rank)

    def newest(self, step: int | None, load: Callable[[], T]) -> T | None:
        """Return what the process with the newest checkpoint loads, on every process; None where nobody has one.

        Args:
            step: of this process's newest checkpoint; None without one.
            load: loads it; the result is sent to the other processes.
        """
        if self.size == 1:
            return None if step is None else load()
        steps = self.gather(step)
        newest = max((each for each in steps if each is not None), default=None)
        if newest is None:
            return None
        source = steps.index(newest)
        sent = [load() if self.rank == source else None]
        dist.broadcast_object_list(sent, src=source)
        return sent[0]

    def longest(self, own: list[int]) -> list[int]:
        """Return the longest of the processes' lists."""
        return own if self.size == 1 else max(self.gather(own), key=len)

    def gather(self, own: T) -> list[T]:
        """Return each process's value, by rank."""
        if self.size == 1:
            return [own]
        collected: list[T] = [own] * self.size
        dist.all_gather_object(collected, own)
        return collected

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Check that all processes have the same settings.

        Raises:
            TrainingError: they differ; the message names the settings.
        """
        if self.size == 1:
            return
        others = self.gather(dict(facts))
        differing = sorted({name for other in others for name in facts if other.get(name) != facts[name]})
        if differing:
            raise TrainingError(
                f"the machines that train together disagree about {', '.join(differing)}",
                "Give all of them the same chats, the same base model and the same options.",
            )
