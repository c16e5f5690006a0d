"""The memory of a process, and the batch that decides how much a training step needs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Memory:
    """Peak memory of a stage, summed over its processes.

    Attributes:
        own: bytes that are freed only when the process ends.
        mapped: bytes of mapped files (weights, libraries), which the system can drop when memory is short.
    """

    own: int
    mapped: int

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.own + other.own, self.mapped + other.mapped)

    @property
    def resident(self) -> int:
        """Bytes that a system monitor shows as long as memory is not short."""
        return self.own + self.mapped


@dataclass(frozen=True)
class BatchShape:
    """Sizes of chats that are computed together, as a packed sequence or a padded batch.

    Attributes:
        tokens: tokens of the batch.
        chats: number of chats; a shared prefix counts as one more, and so does a branch of a chat.
        longest: tokens of the longest chat.
        prefix: tokens of the shared prefix.
        labels: tokens that have a label.
        padded: whether attention computes them as a padded batch, which keeps its scores.
        shared: tokens that chats and branches share, counted in each of them.
    """

    tokens: int
    chats: int
    longest: int
    prefix: int
    labels: int
    padded: bool
    shared: int = 0


class MemoryGap(Enum):
    """Why an engine can't estimate its memory."""

    ENGINE = "there are no formulas for the engine"
    FOUR_BIT = "it depends on bitsandbytes"
    DEVICE = "there are no formulas for the device"
    TRANSFORMERS = "transformers computes the model"


@dataclass(frozen=True)
class GpuMemory:
    """Peak memory of each GPU that trains.

    Attributes:
        needed: bytes.
        size: bytes that the GPU has.
        offloaded: bytes of activations that the host keeps for it.
    """

    needed: int
    size: int
    offloaded: int = 0


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated memory of an engine's processes on one machine.

    Attributes:
        memory: None when it is unknown; `gap` then says why.
        recomputes: whether activations are recomputed in the backward pass to save memory.
        gap: why the memory is unknown.
        detail: the engine, device or reason that belongs to the gap.
        gpu: of each GPU; None if none trains, or it is unknown. `memory` is then that of the processes alone.
    """

    memory: Memory | None
    recomputes: bool = False
    gap: MemoryGap | None = None
    detail: str = ""
    gpu: GpuMemory | None = None


SMALLEST_BATCH = BatchShape(tokens=8, chats=1, longest=8, prefix=0, labels=1, padded=False)
"""What is assumed before the chats have been read."""
