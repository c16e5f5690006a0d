"""Whether a run fits this machine's memory and disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from kolotune.foundation.errors import SpaceError
from kolotune.foundation.formatting import format_size
from kolotune.run_folder.stage import Context

from .advice import Advice, AdviceKind, advise_disk, advise_memory
from .needs import Needs, estimate_needs
from .workload import Workload


class Resource(Enum):
    """What a run can run out of."""

    MEMORY = auto()
    GPU_MEMORY = auto()
    DISK = auto()


@dataclass(frozen=True)
class Shortage:
    """A run that does not fit.

    Attributes:
        resource: what is too small.
        where: the stage that needs the memory, or the folder on the disk.
        needed, free: bytes.
        advice: what to change.
    """

    resource: Resource
    where: str
    needed: int
    free: int
    advice: Advice

    def as_error(self) -> SpaceError:
        """Return the error that refuses the run."""
        needed, free = format_size(self.needed), format_size(self.free)
        if self.resource is Resource.DISK:
            cause = f"{self.where}: the run needs about {needed} of disk space, but only {free} are free"
        elif self.resource is Resource.GPU_MEMORY:
            cause = f"{self.where} needs about {needed} of the GPU's memory, but it has only {free}"
        else:
            cause = f"{self.where} needs about {needed} of memory, but only {free} are free"
        return SpaceError(cause, str(self.advice))


def find_shortages(
    needs: Needs, context: Context, workload: Workload | None, stages: Collection[str], log: Path
) -> list[Shortage]:
    """Return why the run can't fit, each with what to change; the parameters are those of `estimate_needs`."""
    shortages = []
    if needs.peak > needs.free_disk:
        advice = advise_disk(needs, context, workload, stages, log)
        root = str(context.config.output_dir)
        shortages.append(Shortage(Resource.DISK, root, needs.peak, needs.free_disk, advice))
    for stage, memory in needs.memory.items():
        if memory is not None and memory.own > needs.free_memory:
            is_training = stage == "train"
            advice = advise_memory(needs, context, workload) if is_training else Advice(AdviceKind.FREE_MEMORY)
            shortages.append(Shortage(Resource.MEMORY, stage, memory.own, needs.free_memory, advice))
    gpu = needs.gpu
    if gpu is not None and gpu.needed > gpu.size:
        advice = advise_memory(needs, context, workload)
        shortages.append(Shortage(Resource.GPU_MEMORY, "train", gpu.needed, gpu.size, advice))
    return shortages


def require_fit(context: Context, stages: Collection[str], log: Path, workload: Workload | None = None) -> Needs:
    """Return what the stages need, if it fits; the parameters are those of `estimate_needs`.

    Raises:
        SpaceError: it does not fit; the hint says what to change.
    """
    needs = estimate_needs(context, stages, log, workload)
    errors = [shortage.as_error() for shortage in find_shortages(needs, context, workload, stages, log)]
    if errors:
        raise SpaceError("\n".join(error.cause for error in errors), " ".join(error.hint for error in errors))
    return needs
