"""How many bytes each stage writes into the run folder, and the most that the disk has to hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES
from kolotune.engines.engine import get_engine
from kolotune.foundation.files import size_of
from kolotune.gguf.run_matrix import with_matrix
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.weights.model_shape import DTYPE_BYTES, FP32_BYTES, HEADER_ENTRY_BYTES, AdapterShape, ModelShape

from .export_sizes import ExportSizes
from .workload import Workload

_METRICS_LINE_BYTES = 200


@dataclass(frozen=True)
class DiskUse:
    """Bytes that a stage writes.

    Attributes:
        stays: its results.
        passes: temporary files, removed when the stage ends.
        replaced: earlier results, removed once the new ones are complete.
    """

    stays: int
    passes: int = 0
    replaced: int = 0


def stage_disk_use(
    context: Context, shape: ModelShape, sizes: ExportSizes, workload: Workload | None
) -> dict[str, DiskUse]:
    """Return what each stage writes, by the stage's name; `workload` is None before the chats have been read."""
    config, run = context.config, context.run
    quantized = sum(size.size for size in sizes.quantized.values())
    replaced = sum(_existing_bytes(run.quantized(name)) for name in sizes.quantized)
    keeps_unquantized = kept_models(config).unquantized
    if with_matrix(context, sizes.quantized):
        quantized += importance_matrix_bytes(shape)
        replaced += _existing_bytes(run.importance_matrix)
    use = {
        "prepare": DiskUse(_prepared_bytes(context, workload), replaced=_existing_bytes(run.prepared)),
        "train": _training_disk_use(context, shape, workload),
        "merge": DiskUse(sizes.merged, replaced=_existing_bytes(run.merged_model)),
        "convert": DiskUse(sizes.gguf, replaced=_existing_bytes(run.gguf)),
        "quantize": DiskUse(quantized, 0 if keeps_unquantized else sizes.gguf, replaced),
    }
    if set(config.compare_quantization) - set(config.quantization):
        # These are made one at a time, and none is larger than the GGUF that it is made from.
        use["compare"] = DiskUse(0, passes=sizes.gguf * (1 if keeps_unquantized else 2))
    return use


def _training_disk_use(context: Context, shape: ModelShape, workload: Workload | None) -> DiskUse:
    config, run = context.config, context.run
    adapter = AdapterShape.of_options(shape, config)
    dtype_bytes = DTYPE_BYTES[get_engine(config.engine).checkpoint_dtype(config)]
    checkpoint = adapter.checkpoint_bytes(config.early_stopping > 0, dtype_bytes)
    if workload is None:
        checkpoints = min(config.epochs, 3)
    else:
        checkpoints = count_checkpoints(workload.steps_in_epoch, config.epochs, config.checkpoint_steps)
    metrics = _METRICS_LINE_BYTES * (workload.steps if workload else 0)
    return DiskUse(
        min(checkpoints, 2) * checkpoint + adapter.file_bytes + metrics,
        passes=max(0, checkpoint - adapter.file_bytes) if checkpoints > 2 else 0,
        replaced=_existing_bytes(run.adapter) + (0 if config.use_checkpoint else _existing_bytes(run.checkpoints)),
    )


def _prepared_bytes(context: Context, workload: Workload | None) -> int:
    """Return the bytes of tokens, offsets and tokenizer; before the chats are read, the chat files' size counts."""
    tokenizer = sum(_existing_bytes(context.base / name) for name in TOKENIZER_FILES)
    if workload is None:
        return tokenizer + sum(_existing_bytes(path) for path in context.config.train_data)
    return tokenizer + workload.stored


def importance_matrix_bytes(shape: ModelShape) -> int:
    """Return the bytes of an importance matrix: an fp32 number per column of each linear layer."""
    return sum(FP32_BYTES * linear.inputs + HEADER_ENTRY_BYTES for linear in shape.linears)


def count_checkpoints(steps_in_epoch: int, epochs: int, every: int) -> int:
    """Return how many checkpoints a training writes: one per epoch, and one after every `every` steps."""
    steps = range(every, steps_in_epoch * epochs, every) if every else ()
    return epochs + sum(1 for step in steps if step % steps_in_epoch)


def peak_and_end(stages: Iterable[DiskUse]) -> tuple[int, int]:
    """Return the bytes needed beyond those in use before the first stage: at the peak, and at the end."""
    used = peak = 0
    for stage in stages:
        peak = max(peak, used + stage.stays + stage.passes)
        used += stage.stays - stage.replaced
    return max(peak, used), used


def _existing_bytes(path: Path) -> int:
    return size_of(path) if path.exists() else 0
