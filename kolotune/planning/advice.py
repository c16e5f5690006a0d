"""Which option makes a run fit this machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from kolotune.base_models import catalog
from kolotune.engines.engine import get_engine
from kolotune.engines.memory import SMALLEST_BATCH, BatchShape
from kolotune.foundation import hardware
from kolotune.foundation.config import Config
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.formatting import format_size
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.weights.model_shape import read_shape

from .memory import MAIN_PROCESS, training_memory
from .needs import Needs, estimate_needs
from .workload import Workload

_SHORTEST_ADVISED = 256  # tokens; a lower --max-seq-length is no help
_LOWEST_ADVISED_RANK = 4


class AdviceKind(Enum):
    """How a run can be made to fit."""

    GIVE_OPTIONS = auto()
    SMALLER_BASE_MODEL = auto()
    FREE_DISK = auto()
    FREE_MEMORY = auto()
    LARGER_MACHINE = auto()


@dataclass(frozen=True)
class Advice:
    """What to change so that a run fits.

    Attributes:
        kind: what to do.
        options: for ``GIVE_OPTIONS`` and ``SMALLER_BASE_MODEL``, the options to give, as on the command line.
        size: bytes that the run then needs, or that have to be freed.
    """

    kind: AdviceKind
    options: str = ""
    size: int = 0

    def __str__(self) -> str:
        match self.kind:
            case AdviceKind.GIVE_OPTIONS:
                return f"Give {self.options}: then it takes {format_size(self.size)}."
            case AdviceKind.SMALLER_BASE_MODEL:
                return f"Give {self.options}, the largest known base model that fits, or free some memory."
            case AdviceKind.FREE_DISK:
                return f"Free {format_size(self.size)}, or choose another disk with --output-dir."
            case AdviceKind.FREE_MEMORY:
                return "Free some memory."
            case AdviceKind.LARGER_MACHINE:
                return "Free some memory, or train on a larger machine."


def advise_disk(
    needs: Needs, context: Context, workload: Workload | None, stages: Collection[str], log: Path
) -> Advice:
    """Return the first change with which the run fits the disk."""
    config = context.config
    quantized = kept_models(config).quantized
    changes: list[tuple[str, Mapping[str, object]]] = []
    if config.merge_dtype == "fp32":
        changes.append(("--merge-dtype f16", {"merge_dtype": "f16"}))
    changes.append(("--lean", {"lean": True}))
    if len(quantized) > 1:
        first = {"quantization": quantized[:1]}
        changes.append((f"--quantization {quantized[0]}", first))
        changes.append((f"--lean --quantization {quantized[0]}", {**first, "lean": True}))
    for options, change in changes:
        smaller = dataclasses.replace(context, config=_changed(config, change))
        remaining = set(stages) - ({"merge", "convert"} if smaller.config.lean and quantized else set())
        try:
            peak = estimate_needs(smaller, remaining, log, workload).peak
        except KolotuneError:
            continue
        if smaller.config != config and peak <= needs.free_disk:
            return Advice(AdviceKind.GIVE_OPTIONS, options, peak)
    return Advice(AdviceKind.FREE_DISK, size=needs.peak - needs.free_disk)


def advise_memory(needs: Needs, context: Context, workload: Workload | None) -> Advice:
    """Return the first change with which the training fits the memory."""
    shape = read_shape(context.base)
    batch = workload.largest if workload else SMALLEST_BATCH
    on_gpu = needs.gpu is not None
    for options, config, length in _smaller_trainings(context.config, batch, on_gpu):
        shorter = dataclasses.replace(batch, tokens=min(batch.tokens, length), longest=min(batch.longest, length))
        smaller = dataclasses.replace(context, config=config)
        training = training_memory(smaller, shape, shorter, needs.free_memory)
        if training.memory is None or (MAIN_PROCESS + training.memory).own > needs.free_memory:
            continue
        if training.gpu is None:
            return Advice(AdviceKind.GIVE_OPTIONS, options, (MAIN_PROCESS + training.memory).own)
        if training.gpu.needed <= training.gpu.size:
            return Advice(AdviceKind.GIVE_OPTIONS, options, training.gpu.needed)
    dtype_bytes = 2 if hardware.best_dtype() == "bf16" else 4
    for_weights = needs.free_memory - MAIN_PROCESS.own - get_engine(context.config.engine).process_memory.own
    if needs.gpu is not None:
        for_weights = min(for_weights, needs.gpu.size)
    fitting = [model.name for model in catalog.KNOWN if model.parameters * dtype_bytes * 1.3 < for_weights]
    if fitting:
        return Advice(AdviceKind.SMALLER_BASE_MODEL, f"--base-model {fitting[-1]}")
    return Advice(AdviceKind.LARGER_MACHINE)


def _smaller_trainings(config: Config, batch: BatchShape, on_gpu: bool) -> Iterator[tuple[str, Config, int]]:
    """Yield changes that need less memory, the least harmful first: options, config, tokens of the longest chat.

    Args:
        config: the options.
        batch: the batch that needs most.
        on_gpu: whether a GPU trains: there a base in 4 bits costs little time. On a CPU it comes last.
    """
    bases = [("", config)]
    if config.nproc > 1:
        bases = [("--nproc 1", _changed(config, {"nproc": 1}))]
        yield *bases[0], batch.longest
    if config.dtype == "fp32" and hardware.best_dtype() == "bf16":
        options, narrower = bases[-1]
        bases.append((f"{options} --dtype bf16".strip(), _changed(narrower, {"dtype": "bf16"})))
        yield *bases[-1], batch.longest
    options, wider = bases[-1]
    in_4bit = (f"{options} --load-in-4bit".strip(), _changed(wider, {"load_in_4bit": True}))
    if on_gpu and not config.load_in_4bit:
        bases.append(in_4bit)
        yield *in_4bit, batch.longest
    yield from _shorter_and_thinner(bases, batch)
    if not on_gpu and not config.load_in_4bit:
        yield *in_4bit, batch.longest
        yield from _shorter_and_thinner([in_4bit], batch)


def _shorter_and_thinner(bases: list[tuple[str, Config]], batch: BatchShape) -> Iterator[tuple[str, Config, int]]:
    """Yield changes to each of some options and configs: a lower rank, or shorter chats."""
    for options, base in bases:
        rank = base.lora_rank // 2
        while rank >= _LOWEST_ADVISED_RANK:
            yield f"{options} --lora-rank {rank}".strip(), _changed(base, {"lora_rank": rank}), batch.longest
            rank //= 2
        length = 1 << (max(batch.longest - 1, 1).bit_length() - 1)
        while length >= _SHORTEST_ADVISED:
            shorter = _changed(base, {"max_seq_length": length})
            yield f"{options} --max-seq-length {length}".strip(), shorter, length
            length //= 2


def _changed(config: Config, change: Mapping[str, object]) -> Config:
    return dataclasses.replace(config, **change)  # type: ignore[arg-type]  # options by name
