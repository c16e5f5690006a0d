"""What a plan can't know, and why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from kolotune.engines.memory import MemoryGap


class GapKind(Enum):
    """A quantity that is missing from a plan."""

    MEMORY_OF_ENGINE = auto()
    MEMORY_IN_4BIT = auto()
    MEMORY_ON_DEVICE = auto()
    MEMORY_OF_TRANSFORMERS = auto()
    QUANTIZED_SIZES = auto()
    TIME_OF_ENGINE = auto()
    TIME_WHEN_SHARDED = auto()
    TRAFFIC_WHEN_SHARDED = auto()
    NETWORK_TIME = auto()
    COMPARISON = auto()


@dataclass(frozen=True)
class Gap:
    """A missing quantity.

    Attributes:
        kind: which one.
        detail: the engine, the device or the reason, where the kind has one.
    """

    kind: GapKind
    detail: str = ""

    @property
    def is_training_memory(self) -> bool:
        """Whether measured steps can fill the gap with the memory that they used."""
        return self.kind.name.startswith("MEMORY_")


OF_ENGINE_MEMORY = {
    MemoryGap.ENGINE: GapKind.MEMORY_OF_ENGINE,
    MemoryGap.FOUR_BIT: GapKind.MEMORY_IN_4BIT,
    MemoryGap.DEVICE: GapKind.MEMORY_ON_DEVICE,
    MemoryGap.TRANSFORMERS: GapKind.MEMORY_OF_TRANSFORMERS,
}
"""The gaps that an engine reports."""
_SENTENCES = {
    GapKind.MEMORY_OF_ENGINE: "memory at train: there are no formulas for {detail}",
    GapKind.MEMORY_IN_4BIT: "memory at train: it depends on bitsandbytes (--load-in-4bit)",
    GapKind.MEMORY_ON_DEVICE: "memory at train: there are no formulas for training on {detail}",
    GapKind.MEMORY_OF_TRANSFORMERS: "memory at train: transformers computes this model ({detail})",
    GapKind.QUANTIZED_SIZES: "sizes of quantizations: llama.cpp did not report them, so upper bounds are shown",
    GapKind.TIME_OF_ENGINE: "time: {detail} can't be measured",
    GapKind.TIME_WHEN_SHARDED: "time: a single process can't try a base that is sharded over several (--sharding)",
    GapKind.TRAFFIC_WHEN_SHARDED: "network: what {detail} sends per step for a base sharded over machines",
    GapKind.NETWORK_TIME: "time on the network between machines: give its speed with --link-mbit",
    GapKind.COMPARISON: "memory and time of the comparison at the end (--no-compare skips it)",
}


def describe_gap(gap: Gap) -> str:
    """Return the gap as a phrase that completes "not known: …"."""
    return _SENTENCES[gap.kind].format(detail=gap.detail)
