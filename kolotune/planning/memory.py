"""How much memory each stage needs, at its peak and with all its processes."""

from __future__ import annotations

from kolotune.engines.engine import get_engine
from kolotune.engines.memory import SMALLEST_BATCH, BatchShape, Memory, TrainingMemory
from kolotune.foundation.hardware import cores
from kolotune.foundation.quantization_budgets import read_budget
from kolotune.gguf.budgets import SENSITIVITY_TOKENS
from kolotune.gguf.calibration import MOST_TOKENS
from kolotune.gguf.run_matrix import with_matrix
from kolotune.gguf.sensitivity import TOKENS, TOKENS_AT_ONCE
from kolotune.llamacpp.evaluation import BATCH
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.weights.model_shape import DTYPE_BYTES, FP32_BYTES, ModelShape

from .workload import Workload

# Measured on SmolLM2-135M with 40 short chats: the peak of each process, less the tensors that the formulas count.
MAIN_PROCESS = Memory(200_000_000, 45_000_000)  # 150 MB of it seen; tokenizers of twice the vocabulary need more
_QUANTIZER = Memory(30_000_000, 30_000_000)
_QUANTIZER_CORE = 10_000_000  # pieces that a core works on, and those that wait to be written
_COMPENSATION = Memory(900_000_000, 500_000_000)  # PyTorch, transformers, and gaps in the heap; files that are read
_MATRIX_READER = Memory(100_000_000, 40_000_000)  # llama.cpp computing an importance matrix: a guess, not measured


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
    quantizing = quantizer_memory()
    if with_matrix(context, kept_models(context.config).quantized):
        longest = workload.largest.longest if workload else context.config.max_seq_length
        matrix = importance_matrix_memory(shape, longest, BATCH)
        quantizing = max(quantizing, matrix, key=lambda memory: memory.resident)
    if context.config.quantizer == "compensated" and kept_models(context.config).quantized:
        quantizing = max(quantizing, compensation_memory(shape), key=lambda memory: memory.resident)
    if any(read_budget(name) is not None for name in kept_models(context.config).quantized):
        quantizing = max(quantizing, sensitivity_memory(shape), key=lambda memory: memory.resident)
    return {
        "prepare": MAIN_PROCESS,
        "train": MAIN_PROCESS + training.memory if training.memory is not None else None,
        "merge": merging,
        "convert": merging,
        "quantize": MAIN_PROCESS + quantizing,
    }, training


def training_memory(context: Context, shape: ModelShape, batch: BatchShape, free: int) -> TrainingMemory:
    """Return the memory of the engine's processes for the batch that needs most."""
    return get_engine(context.config.engine).training_memory(context.config, context.base, shape, batch, free)


def quantizer_memory() -> Memory:
    """Return the memory of the quantizer, which holds pieces of tensors."""
    return _QUANTIZER + Memory(cores() * _QUANTIZER_CORE, 0)


def compensation_memory(shape: ModelShape) -> Memory:
    """Return the memory of error-compensated quantization, whose peak is at the matrix with most columns.

    Its inputs are held, or a few tensors as large before it; and its Hessian with that in the order of rounding, the
    factor, and what is decomposed. The embedding is dropped before the first layer.
    """
    widest = max((linear.inputs for linear in shape.linears), default=shape.hidden_size)
    layer = 3 * FP32_BYTES * sum(linear.weight_count for linear in shape.linears) // (2 * max(1, shape.layers))
    activations = FP32_BYTES * MOST_TOKENS * (8 * shape.hidden_size + widest)
    at_the_widest = 4 * FP32_BYTES * widest**2
    before_it = 3 * FP32_BYTES * MOST_TOKENS * widest
    embedding = FP32_BYTES * shape.hidden_size * shape.vocabulary_size
    computing = layer + activations + max(at_the_widest, before_it)
    return Memory(_COMPENSATION.own + max(computing, embedding), _COMPENSATION.mapped)


def sensitivity_memory(shape: ModelShape) -> Memory:
    """Return the memory of measuring what types cost: what enters each layer, one layer twice, embedding and head."""
    widest = max((linear.inputs for linear in shape.linears), default=shape.hidden_size)
    layer = 3 * FP32_BYTES * sum(linear.weight_count for linear in shape.linears) // max(1, shape.layers)
    activations = FP32_BYTES * SENSITIVITY_TOKENS * (shape.hidden_size * shape.layers + 12 * widest)
    heads = 3 * FP32_BYTES * shape.hidden_size * shape.vocabulary_size
    logits = FP32_BYTES * shape.vocabulary_size * (TOKENS + 4 * TOKENS_AT_ONCE)
    return Memory(_COMPENSATION.own + layer + activations + heads + logits, _COMPENSATION.mapped)


def importance_matrix_memory(shape: ModelShape, longest: int, batch: int) -> Memory:
    """Return the memory of llama.cpp while it reads chats of up to `longest` tokens, `batch` tokens at a time."""
    cache = 2 * FP32_BYTES * shape.layers * shape.key_value_heads * shape.head_size * longest
    logits = 2 * FP32_BYTES * batch * shape.vocabulary_size
    weights = DTYPE_BYTES["f16"] * shape.weight_count
    return Memory(_MATRIX_READER.own + cache + logits, _MATRIX_READER.mapped + weights)
