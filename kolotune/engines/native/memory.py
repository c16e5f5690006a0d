"""Memory of a training step in the native engine, in bytes, from shapes alone.

A constant that no formula gives says how it was measured, on Linux with PyTorch 2.13. Nothing here imports PyTorch, so
that a run can be refused before it is loaded.
"""

from __future__ import annotations

from dataclasses import replace

from kolotune.weights.model_shape import DTYPE_BYTES, FP32_BYTES, AdapterShape, ModelShape

from ..memory import BatchShape, GpuMemory, Memory

LOGITS_AT_ONCE = 256
"""Positions whose logits the decoder computes together."""

NF4_BLOCK = 64
"""Weights of a matrix in 4 bits that have a scale of their own."""

NF4_AT_ONCE = 1 << 24
"""Weights whose fp32 values are in memory together while a matrix is dequantized, at most."""

CPU_AT_ONCE = 1 << 20
"""The same on a CPU, where few take a quarter of the time: they stay in the cache, and in memory that is kept."""

INPUTS_IN_FLIGHT = 3
"""Layers' inputs that are on a GPU together while they are copied to the host or back."""

BLOCKS_AT_ONCE = 1 << 22
"""Weights of a matrix in a GGUF's blocks whose fp32 values are in memory together."""

# Measured on SmolLM2-135M with 40 short chats: the peak of the process, less the tensors that the formulas count.
PROCESS = Memory(160_000_000, 45_000_000)
"""The engine's process without tensors."""
SHARDED_PROCESS = Memory(420_000_000, 100_000_000)
"""The engine's process with transformers and FSDP loaded, without tensors."""
_GPU_CONTEXT = 500_000_000  # what the driver and PyTorch's libraries take of a GPU: a guess, not measured
_STEP_SHARE = 0.9  # of a GPU's free memory that a step may fill; fragments take the rest: a guess, not measured
# What transformers keeps of a layer, relative to the same tensors of the packed decoder, by bytes per number: measured
# on Llamas of widths 512 and 576, with 128 and 1,024 tokens (1.18 to 1.20; 1.33 to 1.46). It keeps norms in fp32, and
# copies of queries and keys.
_TRANSFORMERS_KEEPS = {4: 1.2, 2: 1.4}


def layer_activation_bytes(shape: ModelShape, adapter: AdapterShape, batch: BatchShape, dtype_bytes: int) -> int:
    """Return the bytes that one layer of the packed decoder keeps for the backward pass.

    Args:
        shape: the model's shape.
        adapter: the adapter's shape; each adapted layer also keeps its product with ``lora_A``.
        batch: the chats that are computed together.
        dtype_bytes: bytes per number.
    """
    attention = shape.attention_heads * shape.head_size
    ranks = sum(adapter.rank_of(linear.name) for linear in shape.first_layer if linear.name in adapter.adapted)
    # The layer's input, the sum between attention and MLP, attention's output, gate and up. What the norms write and
    # the product of gate and up are computed again.
    per_token = 2 * shape.hidden_size + attention + 2 * shape.mlp_size + ranks
    per_token += adapter.scaled_outputs(shape)  # as they are before they are scaled
    expert_ranks = sum(adapter.rank_of(each.name) for each in shape.experts[:2]) or 2 * adapter.rank
    # Each expert of a token has gate and up. Its input is the token's; what it computes of them is computed again.
    per_token += shape.experts_per_token * (2 * shape.mlp_size + expert_ranks)
    heads = shape.attention_heads + 2 * shape.key_value_heads
    # What some families normalize besides: the outputs of attention and MLP; queries and keys, beside the values.
    per_token += 2 * shape.hidden_size * shape.norms_outputs + heads * shape.head_size * shape.norms_heads
    if not batch.padded:
        token_bytes = dtype_bytes * (per_token + heads * shape.head_size) + FP32_BYTES * (2 + shape.attention_heads)
        return batch.tokens * token_bytes
    queries = batch.chats * batch.longest * attention
    keys = batch.chats * (batch.longest + batch.prefix) * 2 * shape.key_value_heads * shape.head_size
    scores = batch.chats * batch.longest * (batch.longest + batch.prefix) * shape.attention_heads
    return batch.tokens * (dtype_bytes * per_token + 2 * FP32_BYTES) + dtype_bytes * (queries + keys + scores)


def transformers_activation_bytes(shape: ModelShape, adapter: AdapterShape, batch: BatchShape, dtype_bytes: int) -> int:
    """Return the bytes that all layers keep of a padded batch when transformers computes them."""
    layer = layer_activation_bytes(shape, adapter, batch, dtype_bytes)
    # What the packed one computes again.
    layer += batch.tokens * dtype_bytes * (2 * shape.hidden_size + shape.mlp_size)
    layer += batch.tokens * dtype_bytes * shape.experts_per_token * (2 * shape.hidden_size + shape.mlp_size)
    return int(shape.layers * _TRANSFORMERS_KEEPS[dtype_bytes] * layer)


def packed_training(
    shape: ModelShape,
    adapter: AdapterShape,
    batch: BatchShape,
    dtype_bytes: int,
    *,
    recompute: bool,
    keeps_best: bool = False,
    in_4bit: bool = False,
    widens: bool = False,
) -> Memory:
    """Return the peak memory of a process that trains with the packed decoder on a CPU.

    Args:
        shape, adapter, batch, dtype_bytes: as in `layer_activation_bytes`.
        recompute: whether activations are recomputed in the backward pass.
        keeps_best: whether the best adapter is kept in memory.
        in_4bit: whether the layers' frozen matrices are kept in 4 bits.
        widens: whether matrices that are stored in bf16 stay so, and are widened to fp32 when they are multiplied.
    """
    frozen = _frozen_bytes(shape, adapter, dtype_bytes, in_4bit)
    if widens and not in_4bit:
        frozen -= (dtype_bytes - DTYPE_BYTES["bf16"]) * shape.bf16_weight_count
    optimizer = _optimizer_bytes(adapter, keeps_best)
    # Between steps, a checkpoint is assembled and serialized.
    temporary = max(
        _packed_step_bytes(shape, adapter, batch, dtype_bytes, recompute, in_4bit),
        2 * adapter.checkpoint_bytes(keeps_best),
    )
    # What was read of the model's file is let go of at once.
    return Memory(PROCESS.own + frozen + optimizer + temporary, PROCESS.mapped)


def packed_on_gpu(
    shape: ModelShape, adapter: AdapterShape, batch: BatchShape, dtype_bytes: int, size: int, *, in_4bit: bool
) -> tuple[GpuMemory, bool]:
    """Return the peak memory of a GPU on which the packed decoder trains, and whether it recomputes activations.

    Where recomputing does not fit, the host keeps the layers' inputs. Where memory runs out all the same, the engine
    halves its micro-batches; this returns what the first that fit need, or, if none do, the smallest: the longest chat
    alone.

    Args:
        shape, adapter, batch, dtype_bytes: as in `layer_activation_bytes`.
        size: bytes that the GPU has.
        in_4bit: as in `packed_training`.
    """
    resident = _GPU_CONTEXT + _frozen_bytes(shape, adapter, dtype_bytes, in_4bit) + _optimizer_bytes(adapter, False)
    resident -= _host_embedding_bytes(shape, dtype_bytes, in_4bit)
    options = (shape, adapter)
    recompute = recomputes_on_gpu(*options, batch, dtype_bytes, size - resident, in_4bit=in_4bit)
    while True:
        offload = recompute and offloads_on_gpu(*options, batch, dtype_bytes, size - resident, in_4bit=in_4bit)
        needed = resident + _packed_step_bytes(*options, batch, dtype_bytes, recompute, in_4bit, offload)
        if needed <= size or batch.tokens <= batch.longest:
            kept = shape.layers * _input_bytes(shape, batch, dtype_bytes) if offload else 0
            return GpuMemory(needed, size, offloaded=kept), recompute
        tokens = max(batch.longest, batch.tokens // 2)
        batch = replace(batch, tokens=tokens, labels=min(batch.labels, tokens), shared=min(batch.shared, tokens))


def gpu_process(shape: ModelShape, adapter: AdapterShape, dtype_bytes: int, *, in_4bit: bool) -> Memory:
    """Return the memory of a process whose tensors are on a GPU; what the driver's libraries take is not counted."""
    own = PROCESS.own + 2 * adapter.checkpoint_bytes(True) + _host_embedding_bytes(shape, dtype_bytes, in_4bit)
    return Memory(own, PROCESS.mapped + shape.stored_bytes)


def _host_embedding_bytes(shape: ModelShape, dtype_bytes: int, in_4bit: bool) -> int:
    """Return the bytes of the embedding where the host keeps it: for a base in 4 bits whose head is a matrix apart."""
    return dtype_bytes * shape.vocabulary_size * shape.hidden_size if in_4bit and not shape.tied else 0


def recomputes_on_gpu(
    shape: ModelShape,
    adapter: AdapterShape,
    batch: BatchShape,
    dtype_bytes: int,
    free: int,
    *,
    in_4bit: bool = False,
) -> bool:
    """Return whether the packed decoder recomputes activations on a GPU: those that it would keep do not fit.

    Args:
        shape, adapter, batch, dtype_bytes: as in `layer_activation_bytes`.
        free: bytes that are free on the GPU once the model is there.
        in_4bit: as in `packed_training`.
    """
    needed = _packed_step_bytes(shape, adapter, batch, dtype_bytes, False, in_4bit)
    return needed > free * _STEP_SHARE


def offloads_on_gpu(
    shape: ModelShape,
    adapter: AdapterShape,
    batch: BatchShape,
    dtype_bytes: int,
    free: int,
    *,
    in_4bit: bool = False,
) -> bool:
    """Return whether the host keeps the layers' inputs of a step that recomputes, as in `recomputes_on_gpu`."""
    needed = _packed_step_bytes(shape, adapter, batch, dtype_bytes, True, in_4bit)
    return needed > free * _STEP_SHARE


def _optimizer_bytes(adapter: AdapterShape, keeps_best: bool) -> int:
    """Return the bytes of the adapter's weights, gradient and AdamW moments; of the best and the first, if kept."""
    return FP32_BYTES * adapter.weight_count * (4 + keeps_best + adapter.keeps_start)


def _frozen_bytes(shape: ModelShape, adapter: AdapterShape, dtype_bytes: int, in_4bit: bool) -> int:
    """Return the bytes of the frozen weights, and of the adapters' columns in their matrices.

    Experts and routers are not kept in 4 bits.
    """
    in_dtype, packed = shape.weight_count + adapter.weight_count, 0
    if in_4bit:
        if shape.blocks:
            in_dtype -= sum(linear.weight_count for linear in shape.linears if linear.name in shape.blocks)
            packed = sum(shape.blocks.values())
        else:
            in_dtype -= shape.dense_weight_count
            packed = shape.dense_weight_count // 2 + FP32_BYTES * (shape.dense_weight_count // NF4_BLOCK)
    return dtype_bytes * in_dtype + packed


def _dequantizing_bytes(shape: ModelShape, dtype_bytes: int) -> int:
    """Return the bytes of the largest matrix in the dtype, while it is dequantized: gate and up are one."""
    weights = max(2 * shape.mlp_size * shape.hidden_size, *(linear.weight_count for linear in shape.first_layer))
    if shape.blocks:  # a part in fp32, as it is scaled, and its quants in bytes while they are put together
        return dtype_bytes * weights + min(weights, BLOCKS_AT_ONCE) * (FP32_BYTES + 3)
    # A part in fp32, and the indices of its levels in int32, two in each.
    return dtype_bytes * weights + min(weights, NF4_AT_ONCE) * (FP32_BYTES + FP32_BYTES // 2)


def _packed_step_bytes(
    shape: ModelShape,
    adapter: AdapterShape,
    batch: BatchShape,
    dtype_bytes: int,
    recompute: bool,
    in_4bit: bool,
    offload: bool = False,
) -> int:
    """Return the bytes at the peak of a step: activations, and a matrix that is dequantized."""
    layer = layer_activation_bytes(shape, adapter, batch, dtype_bytes)
    inputs = min(shape.layers, INPUTS_IN_FLIGHT) if offload else shape.layers
    kept = shape.layers * layer
    if recompute:
        kept = layer + inputs * _input_bytes(shape, batch, dtype_bytes)
    dequantizing = _dequantizing_bytes(shape, dtype_bytes) if in_4bit else 0
    return kept + _temporary_bytes(shape, batch, dtype_bytes) + dequantizing


def _input_bytes(shape: ModelShape, batch: BatchShape, dtype_bytes: int) -> int:
    return batch.tokens * shape.hidden_size * dtype_bytes


def _temporary_bytes(shape: ModelShape, batch: BatchShape, dtype_bytes: int) -> int:
    """Return the bytes that a step allocates and frees again: some logits, or the gradients of a layer."""
    # Logits and their gradient in the dtype, their logarithms in fp32.
    logits = min(batch.labels, LOGITS_AT_ONCE) * shape.vocabulary_size * (2 * dtype_bytes + FP32_BYTES)
    scores = 0
    if batch.padded:
        scores = batch.chats * batch.longest * (batch.longest + batch.prefix) * shape.attention_heads * 3
    rows = batch.tokens * (1 + shape.experts_per_token)
    gradients = dtype_bytes * (rows * (6 * shape.mlp_size + 6 * shape.hidden_size) + scores)
    # Each of those that see a shared key has a gradient for it and its value.
    shared = FP32_BYTES * batch.shared * 2 * shape.key_value_heads * shape.head_size
    return max(logits, gradients + shared)


def transformers_training(
    shape: ModelShape,
    adapter: AdapterShape,
    batch: BatchShape,
    dtype_bytes: int,
    *,
    recompute: bool,
    shards: int = 1,
    gathered: int = 0,
    keeps_best: bool = False,
) -> Memory:
    """Return the peak memory of a process that trains with transformers, with the logits of all labels at once.

    Args:
        shape, adapter, dtype_bytes, recompute, keeps_best: as in `packed_training`.
        batch: a padded batch; its labels are the positions that have one in any chat, times chats.
        shards: the number of processes that share the layers' weights (`--sharding`).
        gathered: how many of those weights are gathered together: a layer on a GPU, a matrix on a CPU.
    """
    layer_weights = shape.layer_weight_count
    frozen = dtype_bytes * (shape.weight_count - layer_weights + layer_weights // shards + 2 * gathered)
    optimizer = _optimizer_bytes(adapter, keeps_best)
    inputs = shape.layers * batch.tokens * shape.hidden_size * dtype_bytes
    kept = transformers_activation_bytes(shape, adapter, batch, dtype_bytes)
    # Logits and their gradient, both also in fp32.
    logits = batch.labels * shape.vocabulary_size * (3 * dtype_bytes + 3 * FP32_BYTES)
    widest = max((linear.outputs for linear in shape.first_layer), default=0)
    gradients = batch.tokens * dtype_bytes * (3 * shape.hidden_size + 3 * widest)
    layer = kept // shape.layers + gradients
    step = inputs + max(layer, logits) if recompute else kept + max(gradients, logits)
    own = SHARDED_PROCESS.own + frozen + optimizer + max(step, 2 * adapter.checkpoint_bytes(keeps_best))
    return Memory(own, SHARDED_PROCESS.mapped + shape.stored_bytes // shards)
