"""The processes that train together: data parallel, each with the whole base and a part of every step's chats.

A step's loss is a sum over its chats divided by its labels, so gradients of parts add up to the gradient of the
whole, and any number of processes makes the same step; the sums' last bits depend on how they were parted. Only the
adapters' gradients travel. torchrun starts the processes and tells each its place by environment variables.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kolotune.foundation.errors import TrainingError

_PATIENCE = datetime.timedelta(minutes=10)  # for the slowest of the others, before a peer counts as gone
_SEED_STEPS = 1_000_003


class World:
    """One process of those that train together; also the only one.

    Attributes:
        rank, size: this process's number, from 0, and how many there are.
        local: its number among those of its machine.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda" and self.size > 1:
            torch.cuda.set_device(self.local)
        self._device = device
        if self.size > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)

    @property
    def writes(self) -> bool:
        """Whether this process writes files and tells events: the first of each machine, whose disk is its own."""
        return self.local == 0

    def close(self) -> None:
        """Leaves the others, after all have come here."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def share(self, indices: Sequence[int], costs: Mapping[int, float]) -> list[int]:
        """This process's part of the chats `indices`, in their order.

        The costliest goes first, each to whoever has least to do (Graham's rule, at most 4/3 of the best).

        Args:
            indices: of the step.
            costs: what each takes, in any unit; not looked at by the only process.
        """
        if self.size == 1:
            return list(indices)
        loads, parts = [0.0] * self.size, {}
        for index in sorted(indices, key=lambda each: (-costs[each], each)):
            to = loads.index(min(loads))
            loads[to] += costs[index]
            parts[index] = to
        return [index for index in indices if parts[index] == self.rank]

    def add_up(self, row: Tensor) -> None:
        """Puts the sum over all processes in the place of `row`."""
        if self.size > 1:
            dist.all_reduce(row)

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if self.size == 1:
            return value
        summed = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(summed)
        return float(summed)

    def as_many(self, groups: list[list[int]], filler: list[int]) -> list[tuple[list[int], float]]:
        """This process's groups of chats, each with the factor 1, and as many fillers with 0 as others have more.

        For models of which all processes compute each group together.
        """
        most = torch.tensor(len(groups), device=self._device)
        if self.size > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return [(group, 1.0) for group in groups] + [(filler, 0.0)] * (int(most) - len(groups))

    def draw_for(self, seed: int, step: int) -> None:
        """Where several train together, random numbers of this step are its own and this process's own."""
        if self.size > 1:
            torch.manual_seed((seed * _SEED_STEPS + step) * self.size + self.rank)

    def newest(self, step: int | None, make: Any) -> Any:
        """What `make()` gives on the process that is furthest, on every process; None where none has a step.

        Args:
            step: how far this process's own checkpoint is; None: it has none.
            make: gives an object that can be sent.
        """
        if self.size == 1:
            return None if step is None else make()
        steps: list[int | None] = [None] * self.size
        dist.all_gather_object(steps, step)
        furthest = max((each for each in steps if each is not None), default=None)
        if furthest is None:
            return None
        source = steps.index(furthest)
        sent = [make() if self.rank == source else None]
        dist.broadcast_object_list(sent, src=source)
        return sent[0]

    def longest(self, own: list[int]) -> list[int]:
        """The longest of the lists that the processes have."""
        if self.size == 1:
            return own
        lists: list[list[int]] = [[]] * self.size
        dist.all_gather_object(lists, own)
        return max(lists, key=len)

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Checks that all processes were asked for the same.

        Raises:
            TrainingError: they were not; the differing facts are named.
        """
        if self.size == 1:
            return
        others: list[Mapping[str, Any]] = [{}] * self.size
        dist.all_gather_object(others, dict(facts))
        differing = sorted({name for other in others for name in facts if other.get(name) != facts[name]})
        if differing:
            raise TrainingError(
                f"the machines that train together disagree about {', '.join(differing)}",
                "Give all of them the same chats, the same base model and the same options.",
            )
