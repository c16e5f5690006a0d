"""How large the exports get. llama.cpp itself is asked, with a GGUF whose weights are a hole in the disk."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from kolotune import llamacpp
from kolotune.foundation.files import write_text
from kolotune.gguf import conversion_plan, convert
from kolotune.gguf.quantized_sizes import Sizes, sizes_in
from kolotune.run_folder.retention import kept_models
from kolotune.run_folder.stage import Context
from kolotune.runners import local

_CACHE_FILE = "quantized.jsonl"


@dataclass(frozen=True)
class ExportSizes:
    """Bytes of everything that is made from the adapter.

    Attributes:
        merged: the merged model folder.
        gguf: the unquantized GGUF.
        quantized: each quantization, by its name.
        is_exact: whether llama.cpp reported the sizes; otherwise those of quantizations are upper bounds.
    """

    merged: int
    gguf: int
    quantized: Mapping[str, Sizes]
    is_exact: bool


def measure_exports(context: Context, log: Path) -> ExportSizes:
    """Return the sizes of a run's exports.

    Raises:
        ToolchainError, ModelError: as from the conversion itself.
    """
    shape, kind = convert.expected(context)
    merged = sum(shard.size for shard in shape.shards) + sum(_text_bytes(text) for text in shape.files.values())
    toolchain = llamacpp.toolchain.find()
    verdict = conversion_plan.draw(shape, kind, toolchain, log) if toolchain is not None else conversion_plan.Verdict()
    names = kept_models(context.config).quantized
    if verdict.outline is None:
        weights = sum(entry.size for shard in shape.shards for entry in shard.entries)
        bound = int(weights * 8.5 / (32 if kind == "f32" else 16))
        return ExportSizes(merged, merged, {name: Sizes(bound, 0.0) for name in names}, is_exact=False)
    size = conversion_plan.size_of(verdict.outline)
    if toolchain is None or not names:
        return ExportSizes(merged, size, {}, is_exact=True)
    cache = conversion_plan.place_of(shape, kind, toolchain) / _CACHE_FILE
    reported = _quantized_sizes(verdict.outline, names, cache, log)
    bounds = {name: Sizes(size, 0.0) for name in names if name not in reported}
    return ExportSizes(merged, size, {**reported, **bounds}, is_exact=not bounds)


def _quantized_sizes(
    outline: conversion_plan.Outline, names: Collection[str], cache: Path, log: Path
) -> dict[str, Sizes]:
    """Return the sizes that llama.cpp reports; it is asked once for each quantization."""
    try:
        lines = cache.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    missing = [name for name in names if name not in sizes_in(lines)]
    if missing:

        def on_line(line: str) -> bool:
            lines.append(line)
            return bool(sizes_in([line]))

        with tempfile.TemporaryDirectory(dir=cache.parent.parent) as folder:
            file = Path(folder, "hollow.gguf")
            conversion_plan.hollow(outline, file)
            argv = local.python("kolotune.gguf.quantized_sizes", str(file), *missing)
            local.run(argv, log=log, on_line=on_line, ends_with_parent=True)
        write_text(cache, "".join(f"{line}\n" for line in lines if sizes_in([line])))
    reported = sizes_in(lines)
    return {name: reported[name] for name in names if name in reported}


def _text_bytes(content: Path | str) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content.encode())
