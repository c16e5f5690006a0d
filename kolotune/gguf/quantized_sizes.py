"""Size of a GGUF after quantizing, from a conversion plan alone, and the time that it takes.

Sizes follow from the rules in `tensor_types`. For the time, ``python -m … TYPE…`` measures how long some weights take
in each type that occurs: a separate process, because the library may abort.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.quantization_budgets import read_budget
from kolotune.foundation.typed_storage import JsonObject
from kolotune.llamacpp import ggml
from kolotune.runners import child_process

from . import header
from .conversion_plan import ConversionPlan
from .header import HeaderReader
from .quantized_header import aligned, quantized_header
from .tensor_types import tensor_types
from .type_choices import weight_count

_CACHED = "seconds_per_weight.json"
_SAMPLE_ROWS, _SAMPLE_WIDTH = 8, 2048  # multiples of every block; some hundredths of a second for the slowest type
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})
_LARGEST = "Q8_0"  # of the types that a budget chooses from
_CASTS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class QuantizedSize:
    """Size and cost of a quantization.

    Attributes:
        size: bytes of the GGUF.
        seconds: time that one core needs for all weights.
    """

    size: int
    seconds: float


def quantized_sizes(
    plan: ConversionPlan, names: Sequence[str], with_matrix: Collection[str], cache: Path, log: Path
) -> dict[str, QuantizedSize]:
    """Return the sizes by quantization; those that the model can't be quantized to are missing.

    Args:
        plan: of the unquantized GGUF.
        names: the quantizations.
        with_matrix: those that are made with an importance matrix.
        cache: the plan's folder in the cache, which keeps the measured times too.
        log: receives what the measurement prints.

    Raises:
        SpaceError: the disk is full.
    """
    reader = HeaderReader(plan.header)
    sizes, weights = {}, {}
    for name in names:
        budget = read_budget(name)
        if budget is not None:  # what is chosen is not known yet: Q8_0 is wider than most, and takes less time
            size = budget.bytes_of(weight_count(reader.summary()), len(plan.header))
            types = tensor_types(reader.summary(), _LARGEST, has_matrix=False)
            unquantized = {tensor: info.type for tensor, info in reader.tensors.items()}
            bound = _size_of(plan, reader, types if size is None else unquantized, _LARGEST)
            sizes[name] = bound if size is None else min(size, bound)
            weights[name] = _quantized_weights(reader, types)
            continue
        with suppress(ToolchainError):
            types = tensor_types(reader.summary(), name, has_matrix=name in with_matrix)
            sizes[name] = _size_of(plan, reader, types, name)
            weights[name] = _quantized_weights(reader, types)
    speeds = _seconds_per_weight({kind for counts in weights.values() for kind in counts}, cache / _CACHED, log)
    return {
        name: QuantizedSize(size, sum(count * speeds.get(kind, 0.0) for kind, count in weights[name].items()))
        for name, size in sizes.items()
    }


def _size_of(plan: ConversionPlan, reader: HeaderReader, types: Mapping[str, str], file_type: str) -> int:
    return len(quantized_header(plan.header, reader, types, file_type)) + sum(
        aligned(header.size_of(reader.tensors[tensor].shape, kind)) for tensor, kind in types.items()
    )


def _quantized_weights(reader: HeaderReader, types: Mapping[str, str]) -> Counter[str]:
    """Return how many weights get each type, without those that are only cast."""
    counts: Counter[str] = Counter()
    for name, kind in types.items():
        if kind not in _CASTS:
            counts[kind] += math.prod(reader.tensors[name].shape)
    return counts


def _seconds_per_weight(kinds: Iterable[str], cached: Path, log: Path) -> dict[str, float]:
    """Return the time of one core for a weight of each type; 0 where it could not be measured."""
    try:
        speeds = typed_storage.read(dict[str, float], cached)
    except (OSError, typed_storage.StorageError):
        speeds = {}
    missing = sorted({*kinds} - {*speeds})

    def on_event(event: str, fields: JsonObject) -> None:
        if event == "speed":
            speeds[str(fields["type"])] = typed_storage.convert(float, fields["seconds"])

    if missing:
        with suppress(ArtifactError, ToolchainError):  # the reason is in the log
            child_process.run(__name__, *missing, log=log, otherwise=ToolchainError, on_event=on_event)
            typed_storage.write(cached, speeds)
    return speeds


def main(arguments: list[str]) -> int:
    """Report the time that a weight takes in each type; return the exit code."""
    return child_process.carry_out(lambda: _report_speeds(arguments))


def _report_speeds(kinds: Sequence[str]) -> None:
    for kind in kinds:
        child_process.emit("speed", type=kind, seconds=_measured_seconds(kind))


def _measured_seconds(kind: str) -> float:
    import numpy as np

    quantize, number = ggml.library().ggml_quantize_chunk, header.type_number(kind)
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
