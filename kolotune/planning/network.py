"""What machines that train together send each other in a step, and how long the network takes for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kolotune.weights.model_shape import FP32_BYTES

LARGEST_SHARE = 0.1
"""The share of a step's time on the network above which a higher `--gradient-accumulation` is advised."""
_ADVISED_SHARE = 0.08  # aim lower: later measurements differ
_BYTES_PER_MEGABIT = 1_000_000 / 8
# Headers of Ethernet, IP and TCP with timestamps in a full packet of 1,500 bytes: 1,448 of 1,538 bytes carry data.
_HEADER_FACTOR = 1538 / 1448
_GATHERS = 2  # a batch gathers a sharded layer twice, forward and backward; counted with FSDP2


@dataclass(frozen=True)
class Traffic:
    """What each machine sends in a step: the adapter's gradients, and the weights of a sharded base.

    Attributes:
        step: bytes that each machine sends in a step; it receives the same number.
        seconds: time on the network; None if its speed is not known.
        computing: seconds that each machine computes in a step; None if not measured.
        accumulation: the batches per step as planned.
        base: bytes of `step` for a sharded base; every batch sends them, so more batches per step don't help.
    """

    step: int
    seconds: float | None = None
    computing: float | None = None
    accumulation: int = 1
    base: int = 0

    @property
    def share(self) -> float | None:
        """The share of a step's time that the network takes."""
        if self.seconds is None or self.computing is None:
            return None
        return self.seconds / max(1e-9, self.seconds + self.computing)

    @property
    def enough(self) -> int | None:
        """The accumulation that keeps the network below `LARGEST_SHARE` of a step: the planned one if it does.

        None if it is not known or no accumulation is enough.
        """
        if self.share is None or self.seconds is None or not self.computing or self.base:
            return None
        if self.share <= LARGEST_SHARE:
            return self.accumulation
        batch = self.computing / self.accumulation
        return math.ceil(self.seconds * (1 - _ADVISED_SHARE) / _ADVISED_SHARE / batch)


def gradient_bytes(weights: int, processes: int) -> int:
    """Return the bytes of gradients that each machine sends in a step, and receives.

    A ring all-reduces them (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009): each process sends
    ``2 (n - 1) / n`` of the gradients to its neighbour, and one process per machine has its neighbour on another one.

    Args:
        weights: of the adapter; a gradient has 4 bytes.
        processes: on all machines together.
    """
    return math.ceil(2 * (processes - 1) / processes * FP32_BYTES * weights)


def sharded_base_bytes(layers: int, processes: int, batches: int) -> int:
    """Return the bytes of a sharded base that each machine sends in a step, and receives.

    Each time the layers are gathered in a ring, a process passes on all shards but one. There is nothing to reduce, as
    the base is frozen (Rajbhandari et al., ZeRO, 2020, section 7, without the gradients' share).

    Args:
        layers: bytes of the layers' weights.
        processes: on all machines together.
        batches: that each process computes one after the other in a step.
    """
    return math.ceil((processes - 1) / processes * layers * batches * _GATHERS)


def transfer_seconds(sent: int, megabits: float) -> float:
    """Return the seconds that a network of `megabits` per second needs for `sent` bytes and their packet headers."""
    return sent * _HEADER_FACTOR / (megabits * _BYTES_PER_MEGABIT)
