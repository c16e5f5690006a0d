"""How long a run takes, from a few real training steps and the other stages' work on a few megabytes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kolotune.engines.engine import get_engine
from kolotune.engines.events import Calibration
from kolotune.foundation.files import replacing
from kolotune.foundation.hardware import cores
from kolotune.foundation.hashing import HashedFile, hash_file
from kolotune.foundation.objectives import OBJECTIVES
from kolotune.foundation.quantization_budgets import read_budget
from kolotune.gguf.calibration import MOST_TOKENS
from kolotune.gguf.importance_matrix import tokens_read
from kolotune.gguf.run_matrix import with_matrix
from kolotune.run_folder.stage import Context
from kolotune.stages import train
from kolotune.weights.merge import MergedModel
from kolotune.weights.model_shape import ModelShape, read_shape

from .disk import DiskUse, count_checkpoints
from .export_sizes import ExportSizes
from .workload import Workload

if TYPE_CHECKING:
    import numpy as np

_SAMPLE_BYTES = 64_000_000
# Seconds to start the quantizer's process once more, and for its other output; measured on 2 cores.
_QUANTIZER_START = 1.5
# llama.cpp's time per token of an importance matrix in f16, relative to training. A guess, on the safe side.
_READING_FACTOR = 1.0
# Compensated quantization on a processor with AVX2: operations of one core in a second in products and decompositions,
# seconds of one core for each weight beside them, and seconds to start.
_COMPENSATION_RATE, _COMPENSATION_WEIGHT, _COMPENSATION_START = 5e10, 3e-7, 10.0
_HESSIANS = 3  # as wide as the hidden states: of what goes into attention, out of it, and into the MLP

# Seconds of one core for a weight, to measure what each type costs it, and to measure the divergence of a file. Not
# measured on a quiet machine.
_SENSITIVITY, _DIVERGENCE = 1.2e-6, 3e-7

# Share of a step that its forward pass takes: the backward pass of adapters costs about twice as much.
_FORWARD = 1 / 3


@dataclass(frozen=True)
class MeasuredSteps:
    """A calibration, and the seconds that hashing its inputs took before it started."""

    calibration: Calibration
    hashing: float


def measure_steps(context: Context) -> MeasuredSteps:
    """Train a few steps in `context.run`, a temporary run folder.

    Raises:
        TrainingError: the steps failed.
    """
    started = time.perf_counter()
    job = train.make_job(context)
    hashing = time.perf_counter() - started
    # One process is enough: the others do the same at the same time, and network.py knows what they send each other.
    job = dataclasses.replace(job, resume=False, nproc=1, nnodes=1, rdzv=None)
    engine = get_engine(context.config.engine)
    return MeasuredSteps(engine.calibrate(job, context.run.job, context.run.log("plan")), hashing)


@dataclass(frozen=True)
class Rates:
    """Seconds per byte.

    Attributes:
        merging: of merging or converting, which read, compute, write and hash.
        hashing: of hashing alone.
    """

    merging: float
    hashing: float


def measure_rates(context: Context) -> Rates:
    """Measure the rates with the first weights of the base, in `context.run`."""
    model = MergedModel(None, context.base, context.config.merge_dtype)
    file = context.run.root / "sample"

    def blocks() -> Iterator[np.ndarray]:
        for entry in model.entries:
            yield from model.blocks(entry)

    size = 0
    started = time.perf_counter()
    with replacing(file) as partial, HashedFile(partial) as stream:
        for block in blocks():
            stream.write(block)
            size += block.nbytes
            if size >= _SAMPLE_BYTES:
                break
    merging = (time.perf_counter() - started) / max(1, size)
    started = time.perf_counter()
    hash_file(file)
    hashing = (time.perf_counter() - started) / max(1, size)
    file.unlink()
    return Rates(merging, hashing)


def stage_seconds(
    context: Context,
    workload: Workload,
    sizes: ExportSizes,
    disk: Mapping[str, DiskUse],
    steps: MeasuredSteps,
    rates: Rates,
) -> dict[str, float]:
    """Return the seconds of each stage that `disk` names, except prepare, which was done and timed."""
    seconds = {}
    if "train" in disk:
        seconds["train"] = _training_seconds(context, workload, steps)
    if "merge" in disk:
        seconds["merge"] = sizes.merged * rates.merging
    if "convert" in disk:
        seconds["convert"] = sizes.gguf * rates.merging
    if "quantize" in disk:
        unquantized = disk["quantize"].passes * rates.merging
        seconds["quantize"] = unquantized + sum(
            _QUANTIZER_START + size.seconds / cores() + sizes.gguf * rates.hashing / 2 + size.size * rates.merging
            for size in sizes.quantized.values()
        )
        if context.config.quantizer == "compensated":
            each = _COMPENSATION_START + compensation_work(read_shape(context.base)) / cores()
            seconds["quantize"] += len(sizes.quantized) * each
        budgets = [budget for name in sizes.quantized if (budget := read_budget(name)) is not None]
        if budgets:
            again = sum(budget.kl is not None for budget in budgets)
            weights = sizes.gguf / 2
            seconds["quantize"] += weights * (_SENSITIVITY + again * _DIVERGENCE) / cores()
        if with_matrix(context, sizes.quantized):
            read = tokens_read(workload.tokens, workload.chats)
            seconds["quantize"] += _READING_FACTOR * steps.calibration.per_token * read
    return seconds


def compensation_work(shape: ModelShape) -> float:
    """Return the seconds of one core that error-compensated quantization takes, without the start."""
    weights = sum(linear.weight_count for linear in shape.linears)
    widest = max((linear.inputs for linear in shape.linears), default=shape.hidden_size)
    products = 4.0 * MOST_TOKENS * weights  # the tokens go through each layer twice
    for columns, results in [(shape.hidden_size, shape.hidden_size)] * _HESSIANS + [(widest, shape.hidden_size)]:
        statistics = MOST_TOKENS * columns * (1.25 * columns + 2 * results)  # half a Hessian, and what was lost
        decompositions = 2 / 3 * columns**3 + 2 * columns**2 * results
        products += shape.layers * (statistics + decompositions)
    feedback = shape.hidden_size * (weights + 2 * weights)  # errors of the columns before, and what is restored
    return (products + feedback) / _COMPENSATION_RATE + weights * _COMPENSATION_WEIGHT


def _training_seconds(context: Context, workload: Workload, steps: MeasuredSteps) -> float:
    config, measured = context.config, steps.calibration
    evaluations = (config.epochs + 1) * workload.held_out_tokens * measured.per_held_out_token
    tokens = workload.tokens * config.epochs
    mean = workload.tokens / max(1, workload.steps_in_epoch)
    checkpoints = count_checkpoints(workload.steps_in_epoch, config.epochs, config.checkpoint_steps)
    objective = OBJECTIVES[config.objective]
    forward = workload.tokens * measured.per_token * _FORWARD
    more = forward * objective.has_reference + forward * config.epochs * objective.estimates_divergence
    warming_up = max(0.0, measured.first - measured.per_token * mean) if tokens else 0.0
    return (
        steps.hashing + measured.start + warming_up + tokens * measured.per_token + evaluations
        + checkpoints * measured.checkpoint + more
    )  # fmt: skip
