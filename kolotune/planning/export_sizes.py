"""How large the exports get, from the conversion plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kolotune import llamacpp
from kolotune.gguf import plan_cache
from kolotune.gguf.conversion_source import expected_skeleton
from kolotune.gguf.quantized_sizes import QuantizedSize, quantized_sizes
from kolotune.gguf.run_matrix import with_matrix
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context


@dataclass(frozen=True)
class ExportSizes:
    """Bytes of everything that is made from the adapter.

    Attributes:
        merged: the merged model folder.
        gguf: the unquantized GGUF.
        quantized: each quantization, by its name.
        is_exact: whether the sizes of quantizations are known; otherwise some are upper bounds.
    """

    merged: int
    gguf: int
    quantized: Mapping[str, QuantizedSize]
    is_exact: bool


def measure_exports(context: Context, log: Path) -> ExportSizes:
    """Return the sizes of a run's exports.

    Raises:
        ToolchainError, ModelError: as from the conversion itself.
    """
    skeleton, gguf_type = expected_skeleton(context)
    merged = sum(shard.size for shard in skeleton.shards)
    merged += sum(skeleton.file_size(name) for name in skeleton.files)
    names = kept_models(context.config).quantized
    toolchain = llamacpp.find()
    plan = None if toolchain is None else plan_cache.find_plan(skeleton, gguf_type, toolchain, log).plan
    if toolchain is None or plan is None:
        weights = sum(entry.size for shard in skeleton.shards for entry in shard.entries)
        bound = int(weights * 8.5 / (32 if gguf_type == "f32" else 16))
        return ExportSizes(merged, merged, {name: QuantizedSize(bound, 0.0) for name in names}, is_exact=False)
    cache = plan_cache.plan_folder(skeleton, gguf_type, toolchain)
    known = quantized_sizes(plan, names, with_matrix(context, names), cache, log)
    bounds = {name: QuantizedSize(plan.size, 0.0) for name in names if name not in known}
    return ExportSizes(merged, plan.size, {**known, **bounds}, is_exact=not bounds)
