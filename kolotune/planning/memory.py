"""How much memory each stage needs, at its peak and with all its processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kolotune.engines.memory import BatchShape, Memory
from kolotune.engines.native import families
from kolotune.engines.native import memory as native
from kolotune.foundation import hardware
from kolotune.gguf.run_matrix import with_matrix
from kolotune.llamacpp.evaluation import BATCH
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.stages import train
from kolotune.weights.model_shape import DTYPE_BYTES, FP32_BYTES, AdapterShape, ModelShape

from .gaps import Gap, GapKind
from .workload import Workload

# Measured on SmolLM2-135M with 40 short chats: the peak of each process, less the tensors that the formulas count.
MAIN_PROCESS = Memory(320_000_000, 60_000_000)
_QUANTIZER = Memory(30_000_000, 20_000_000)
_MATRIX_READER = Memory(100_000_000, 40_000_000)  # llama.cpp computing an importance matrix: a guess, not measured
SMALLEST_BATCH = BatchShape(tokens=8, chats=1, longest=8, prefix=0, labels=1, padded=False)
"""What is assumed before the chats have been read."""


@dataclass(frozen=True)
class TrainingMemory:
    """Memory of the engine's processes.

    Attributes:
        memory: None if it is not known; `gap` then says why.
        recomputes: whether activations are recomputed in the backward pass to save memory.
        gap: why the memory is not known.
    """

    memory: Memory | None
    recomputes: bool = False
    gap: Gap | None = None


def stage_memory(
    context: Context, shape: ModelShape, workload: Workload | None, free: int
) -> tuple[dict[str, Memory | None], TrainingMemory]:
    """Return the memory of each stage by its name, and that of the engine alone.

    Args:
        context: the run.
        shape: of the base model.
        workload: what is trained on; None before the chats have been read.
        free: bytes of free memory.
    """
    training = training_memory(context, shape, workload.largest if workload else SMALLEST_BATCH, free)
    merging = Memory(MAIN_PROCESS.own, MAIN_PROCESS.mapped + shape.stored_bytes)
    quantizing = quantizer_memory(shape)
    if with_matrix(context, kept_models(context.config).quantized):
        longest = workload.largest.longest if workload else context.config.max_seq_length
        matrix = importance_matrix_memory(shape, longest, BATCH)
        quantizing = max(quantizing, matrix, key=lambda memory: memory.resident)
    return {
        "prepare": MAIN_PROCESS,
        "train": MAIN_PROCESS + training.memory if training.memory is not None else None,
        "merge": merging,
        "convert": merging,
        "quantize": MAIN_PROCESS + quantizing,
    }, training


def training_memory(context: Context, shape: ModelShape, batch: BatchShape, free: int) -> TrainingMemory:
    """Return the memory of the engine's processes for the batch that needs most."""
    config = context.config
    gap = _training_gap(context, batch)
    if gap is not None:
        return TrainingMemory(None, gap=gap)
    adapter = AdapterShape.of(shape, config.lora_rank, config.target_modules)
    dtype_bytes = DTYPE_BYTES[config.dtype]
    keeps_best = config.early_stopping > 0
    if train.is_sharded(config, context.base):
        recompute = True
        process = native.transformers_training(
            shape,
            adapter,
            batch,
            dtype_bytes,
            recompute=True,
            shards=config.nproc * config.nnodes,
            gathered=max((linear.weight_count for linear in shape.linears), default=0),
            keeps_best=keeps_best,
        )
    else:
        activations = shape.layers * native.layer_activation_bytes(shape, adapter, batch, dtype_bytes)
        without = native.packed_training(shape, adapter, SMALLEST_BATCH, dtype_bytes, recompute=False).own
        recompute = activations > max(0, free // config.nproc - without) // 2
        process = native.packed_training(shape, adapter, batch, dtype_bytes, recompute=recompute, keeps_best=keeps_best)
    return TrainingMemory(Memory(process.own * config.nproc, process.mapped * config.nproc), recompute)


def _training_gap(context: Context, batch: BatchShape) -> Gap | None:
    """Return why the formulas say nothing about this training."""
    config = context.config
    if config.engine != "native":
        return Gap(GapKind.MEMORY_OF_ENGINE, config.engine)
    if config.load_in_4bit:
        return Gap(GapKind.MEMORY_IN_4BIT)
    if hardware.best_device() != "cpu":
        return Gap(GapKind.MEMORY_ON_DEVICE, hardware.best_device())
    if train.is_sharded(config, context.base):
        return None
    reason = families.why_not(context.base, batch.longest)
    return Gap(GapKind.MEMORY_OF_TRANSFORMERS, reason) if reason else None


def quantizer_memory(shape: ModelShape) -> Memory:
    """Return the memory of llama.cpp's quantizer: a tensor at a time, as fp32 and in its new type."""
    largest = max(math.prod(entry.shape) for entry in shape.entries)
    return Memory(_QUANTIZER.own + 5 * largest, _QUANTIZER.mapped + 2 * largest)


def importance_matrix_memory(shape: ModelShape, longest: int, batch: int) -> Memory:
    """Return the memory of llama.cpp while it reads chats of up to `longest` tokens, `batch` tokens at a time."""
    cache = 2 * FP32_BYTES * shape.layers * shape.key_value_heads * shape.head_size * longest
    logits = 2 * FP32_BYTES * batch * shape.vocabulary_size
    weights = DTYPE_BYTES["f16"] * shape.weight_count
    return Memory(_MATRIX_READER.own + cache + logits, _MATRIX_READER.mapped + weights)
