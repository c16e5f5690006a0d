"""Size of a GGUF after quantizing, computed by llama.cpp itself: ``python -m … GGUF TYPE…``.

The GGUF needs its header only; its weights may be zeros that take no space on disk. For each type of tensor that
llama.cpp chooses, some weights are quantized to measure the time. A separate process, because the library may abort.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.foundation.typed_storage import JsonObject
from kolotune.llamacpp import ggml
from kolotune.llamacpp.log import messages_to
from kolotune.runners import child_process

from . import header
from .conversion_plan import ConversionPlan, write_sparse_gguf

# "[ 264/ 272] blk.29.attn_k.weight - [ 576, 192, 1, 1], type = f16, size = 0.21 MiB -> 0.07 MiB (q5_0)"
_LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[\d, ]+\], type = +(\S+?),.*?(?:-> .*\((\S+)\))?\s*$")
_ALIGNMENT = 32
_CACHED = "quantized.json"
_SAMPLE_ROWS, _SAMPLE_WIDTH = 8, 2048  # multiples of every block; some hundredths of a second for the slowest type
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})


@dataclass(frozen=True)
class QuantizedSize:
    """Size and cost of a quantization.

    Attributes:
        size: bytes of the GGUF.
        seconds: time that one core needs for all weights.
    """

    size: int
    seconds: float


def quantized_sizes(plan: ConversionPlan, names: Sequence[str], cache: Path, log: Path) -> dict[str, QuantizedSize]:
    """Return the sizes by quantization; those that the library can't compute are missing.

    Args:
        plan: of the unquantized GGUF.
        names: the quantizations.
        cache: the plan's folder in the cache, which keeps the sizes too.
        log: receives the library's messages.

    Raises:
        SpaceError: the disk is full.
    """
    file = cache / _CACHED
    try:
        sizes = typed_storage.read(dict[str, QuantizedSize], file)
    except (OSError, typed_storage.StorageError):
        sizes = {}
    missing = [name for name in names if name not in sizes]
    if missing:
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
            gguf = Path(folder, "sparse.gguf")
            write_sparse_gguf(plan, gguf)
            sizes |= _measure(gguf, missing, log)
        typed_storage.write(file, {name: asdict(size) for name, size in sizes.items()})
    return {name: sizes[name] for name in names if name in sizes}


def _measure(source: Path, names: Sequence[str], log: Path) -> dict[str, QuantizedSize]:
    sizes: dict[str, QuantizedSize] = {}

    def on_event(event: str, fields: JsonObject) -> None:
        if event == "size":
            sizes[str(fields["type"])] = typed_storage.convert(QuantizedSize, fields)

    with suppress(ArtifactError, ToolchainError):  # the plan then shows a bound; the reason is in the log
        child_process.run(__name__, str(source), *names, log=log, otherwise=ToolchainError, on_event=on_event)
    return sizes


def main(arguments: list[str]) -> int:
    """Report the sizes; return the exit code."""
    return child_process.carry_out(lambda: _report_sizes(Path(arguments[0]), arguments[1:]))


def _report_sizes(source: Path, names: Sequence[str]) -> None:
    tensors = header.read(source).tensors
    start = source.stat().st_size - sum(_aligned(tensor.size) for tensor in tensors.values())
    speeds: dict[str, float] = {}
    for name in names:
        chosen = _chosen_types(source, name)
        if set(chosen) != set(tensors):
            raise ToolchainError(f"llama.cpp listed {len(chosen)} tensors of {len(tensors)}")
        size, seconds = start, 0.0
        for tensor_name, tensor in tensors.items():
            count, kind = math.prod(tensor.shape), chosen[tensor_name].upper()
            block, block_bytes = header.block_of(kind)
            size += _aligned(count // block * block_bytes)
            if kind != tensor.type.upper():
                speeds.setdefault(kind, _seconds_per_weight(kind))
                seconds += count * speeds[kind]
        child_process.emit("size", type=name, size=size, seconds=seconds)


def _chosen_types(source: Path, name: str) -> dict[str, str]:
    """Return the type that each tensor gets in the quantization `name`."""
    import llama_cpp

    texts: list[str] = []
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[name]
    parameters.dry_run = True
    with messages_to(lambda _, text: texts.append(text)):
        code = llama_cpp.llama_model_quantize(str(source).encode(), b"", ctypes.byref(parameters))
    if code != 0:
        raise ArtifactError(f"llama.cpp can't quantize to {name}: {''.join(texts)[-300:]}")
    matches = (_LINE.search(line) for line in "".join(texts).splitlines())
    return {match[1]: match[3] or match[2] for match in matches if match}


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _seconds_per_weight(kind: str) -> float:
    """Return the time of one core; 0 for a type that needs no more than a cast."""
    import gguf
    import numpy as np

    number = next((known.value for known in gguf.GGMLQuantizationType if known.name == kind), None)
    if kind in ("F32", "F16", "BF16") or number is None:
        return 0.0
    try:
        quantize = ggml.library().ggml_quantize_chunk
    except ToolchainError:
        return 0.0
    values = np.random.default_rng(0).standard_normal((_SAMPLE_ROWS, _SAMPLE_WIDTH), np.float32)
    target = np.empty(values.nbytes, np.uint8)
    uniform = np.ones(_SAMPLE_WIDTH, np.float32)
    importance = uniform.ctypes.data if kind in _NEED_IMPORTANCE else None

    def timed() -> float:
        started = time.thread_time()
        quantize(number, values.ctypes.data, target.ctypes.data, 0, _SAMPLE_ROWS, _SAMPLE_WIDTH, importance)
        return time.thread_time() - started

    timed()  # the first call makes tables
    return min(timed(), timed()) / values.size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
