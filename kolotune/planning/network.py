"""What machines that train together send each other in a step, and how long a network takes over it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kolotune.engines.estimates import FP32, GATHERS

MOST_SHARE = 0.1
"""Of a step's time: more than that spent on the network is worth another `--gradient-accumulation`."""
_AIM = 0.08  # where a lower share is wanted: what was measured differs from what then is
_MEGABIT = 1_000_000 / 8
# What Ethernet, IP and TCP with time stamps add to a full packet of 1,500 bytes: 1,448 of 1,538 carry data.
_PACKED = 1538 / 1448


@dataclass(frozen=True)
class Traffic:
    """What machines send each other in a step: the adapter's gradients, and a base that is parted over them.

    Attributes:
        step: bytes that each machine sends in a step, and as many that it gets.
        seconds: that the network takes over them; None: its speed was not given.
        computing: seconds of a step's batches on each machine; None: not measured.
        accumulation: the batches of a step as planned.
        base: bytes of `step` that are the parted base's; they come with every batch, so that more batches don't help.
    """

    step: int
    seconds: float | None = None
    computing: float | None = None
    accumulation: int = 1
    base: int = 0

    @property
    def share(self) -> float | None:
        """Of a step's time that the network takes."""
        if self.seconds is None or self.computing is None:
            return None
        return self.seconds / max(1e-9, self.seconds + self.computing)

    @property
    def enough(self) -> int | None:
        """The accumulation that keeps the network below `MOST_SHARE` of a step: the planned one, if it does.

        None: it is not known, or none does.
        """
        if self.share is None or self.seconds is None or not self.computing or self.base:
            return None
        if self.share <= MOST_SHARE:
            return self.accumulation
        batch = self.computing / self.accumulation
        return math.ceil(self.seconds * (1 - _AIM) / _AIM / batch)


def of_step(weights: int, processes: int) -> int:
    """Bytes that leave each machine in a step, and as many that come.

    The gradients are added up in a ring (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms, 2009): each
    process sends its neighbour ``2 (n - 1) / n`` of them, and on each machine one process's neighbour is on another.

    Args:
        weights: of the adapter; a gradient has 4 bytes.
        processes: that train together, on all machines.
    """
    return math.ceil(2 * (processes - 1) / processes * FP32 * weights)


def of_parted_base(layers: int, processes: int, batches: int) -> int:
    """Bytes that leave each machine in a step, and as many that come, when the layers are parted over the processes.

    Each time that layers are gathered, in a ring, a process passes on all parts but one. Nothing is summed up: the base
    is frozen (Rajbhandari et al., ZeRO, 2020, section 7, without the gradients' part).

    Args:
        layers: bytes of the layers' weights.
        processes: that train together, on all machines.
        batches: that each process computes one after the other in a step.
    """
    return math.ceil((processes - 1) / processes * layers * batches * GATHERS)


def seconds(sent: int, megabits: float) -> float:
    """Seconds that a network of so many megabits a second takes to carry so many bytes, with the packets' headers."""
    return sent * _PACKED / (megabits * _MEGABIT)
