"""What a run needs: memory and disk space of each stage, compared with what is free.

Everything is estimated from shapes and headers; no weight is read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from kolotune.engines.memory import GpuMemory, Memory
from kolotune.foundation import hardware
from kolotune.foundation.files import free_space
from kolotune.run_folder.stage import Context
from kolotune.weights.model_shape import read_shape

from .disk import DiskUse, peak_and_end, stage_disk_use
from .export_sizes import ExportSizes, measure_exports
from .gaps import OF_ENGINE_MEMORY, Gap, GapKind
from .memory import stage_memory
from .workload import Workload


@dataclass(frozen=True)
class Needs:
    """What a run needs.

    Attributes:
        memory: by stage, all its processes together; None if it is not known, and `gaps` says why.
        disk: by stage.
        peak, end: bytes on the disk beyond those in use now.
        free_memory, free_disk: bytes.
        recomputes: whether activations are recomputed in the backward pass to save memory.
        gaps: what is not known.
        gpu: memory of each GPU that trains; None if none does, or it is not known.
    """

    memory: dict[str, Memory | None]
    disk: dict[str, DiskUse]
    peak: int
    end: int
    free_memory: int
    free_disk: int
    recomputes: bool = False
    gaps: list[Gap] = field(default_factory=list)
    gpu: GpuMemory | None = None

    @property
    def largest_memory(self) -> Memory:
        """The memory of the stage that needs most, among those known."""
        known = [memory for memory in self.memory.values() if memory is not None]
        return max(known, key=lambda memory: memory.resident, default=Memory(0, 0))


def estimate_needs(context: Context, stages: Collection[str], log: Path, workload: Workload | None = None) -> Needs:
    """Return what the named stages need.

    Args:
        context: the run; its folder need not exist yet.
        stages: names of the stages that have work.
        log: file for llama.cpp's output.
        workload: what is trained on; None before the chats have been read: the least possible is assumed.

    Raises:
        ToolchainError, ModelError: as from the conversion itself.
    """
    shape = read_shape(context.base)
    free = hardware.free_memory()
    memory, training = stage_memory(context, shape, workload, free)
    exports = not {"convert", "quantize", "merge"}.isdisjoint(stages)
    sizes = measure_exports(context, log) if exports else ExportSizes(0, 0, {}, is_exact=True)
    gaps = [Gap(OF_ENGINE_MEMORY[training.gap], training.detail)] if training.gap is not None else []
    if not sizes.is_exact:
        gaps.append(Gap(GapKind.QUANTIZED_SIZES))
    disk = {name: use for name, use in stage_disk_use(context, shape, sizes, workload).items() if name in stages}
    peak, end = peak_and_end(disk.values())
    return Needs(
        {name: needed for name, needed in memory.items() if name in stages},
        disk,
        peak,
        end,
        free,
        free_space(context.run.root),
        training.recomputes and "train" in stages,
        gaps if "train" in stages else [],
        training.gpu if "train" in stages else None,
    )
