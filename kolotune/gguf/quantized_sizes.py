"""What quantizing would make, asked of llama.cpp itself: ``python -m … GGUF TYPE…``, a line of JSON for each TYPE.

GGUF needs a header only; the weights behind it may be a hole in the disk. Of each type of tensors that llama.cpp
chooses some weights are quantized, to see how long it takes. A process of its own, because the library may abort.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.errors import ArtifactError, ToolchainError
from kolotune.foundation.quantization_types import FILE_TYPES
from kolotune.llamacpp import ggml
from kolotune.llamacpp.log import messages_to
from kolotune.runners.watchdog import end_with_parent

from . import header

# "[ 264/ 272] blk.29.attn_k.weight - [ 576, 192, 1, 1], type = f16, size = 0.21 MiB -> 0.07 MiB (q5_0)"
_LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[\d, ]+\], type = +(\S+?),.*?(?:-> .*\((\S+)\))?\s*$")
_ALIGNMENT = 32
_SAMPLE_ROWS, _SAMPLE_WIDTH = 8, 2048  # multiples of every block; some hundredths of a second for the slowest type
_NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"})


@dataclass(frozen=True)
class Sizes:
    """A quantization to be.

    Attributes:
        size: bytes of the GGUF.
        seconds: of one core, for all weights.
    """

    size: int
    seconds: float


def sizes_in(lines: list[str]) -> dict[str, Sizes]:
    """What the process answered, by the names of the quantizations."""
    found = {}
    for line in lines:
        try:
            told = json.loads(line)
            found[str(told["type"])] = Sizes(int(told["size"]), float(told["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def main(arguments: list[str]) -> int:
    """Prints the sizes; 0 when the library knew an answer for each."""
    end_with_parent()
    source, *names = arguments
    summary = header.read(Path(source))
    filled = sum(_filled(size) for _, _, size in summary.tensors.values())
    begin = Path(source).stat().st_size - filled
    speeds: dict[str, float] = {}
    for name in names:
        kinds = _kinds(source, name)
        if set(kinds) != set(summary.tensors):
            print(f"llama.cpp told of {len(kinds)} tensors, and there are {len(summary.tensors)}")
            return 1
        size, seconds = begin, 0.0
        for tensor, (shape, before, _) in summary.tensors.items():
            count = 1
            for extent in shape:
                count *= extent
            kind = kinds[tensor].upper()
            size += _filled(_bytes(kind, count))
            if kind != before.upper():
                speeds.setdefault(kind, _seconds_a_weight(kind))
                seconds += count * speeds[kind]
        print(json.dumps({"type": name, "size": size, "seconds": seconds}), flush=True)
    return 0


def _kinds(source: str, name: str) -> dict[str, str]:
    """The type of each tensor, by its name, in quantization `name`."""
    import llama_cpp

    told: list[str] = []
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FILE_TYPES[name]
    parameters.dry_run = True
    with messages_to(lambda _, text: told.append(text)):
        code = llama_cpp.llama_model_quantize(source.encode(), b"", ctypes.byref(parameters))
    if code != 0:
        raise ArtifactError(f"llama.cpp can't quantize to {name}: {''.join(told)[-300:]}")
    found = {}
    for line in "".join(told).splitlines():
        if match := _LINE.search(line):
            found[match[1]] = match[3] or match[2]
    return found


def _filled(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _bytes(kind: str, count: int) -> int:
    block, size = header.block_of(kind)
    return count // block * size


def _seconds_a_weight(kind: str) -> float:
    """Of one core; 0 for a type that is no more than a cast."""
    import gguf
    import numpy as np

    number = next((each.value for each in gguf.GGMLQuantizationType if each.name == kind), None)
    if kind in ("F32", "F16", "BF16") or number is None:
        return 0.0
    try:
        quantize = ggml.library().ggml_quantize_chunk
    except ToolchainError:
        return 0.0
    values = np.random.default_rng(0).standard_normal((_SAMPLE_ROWS, _SAMPLE_WIDTH), np.float32)
    room = np.empty(values.nbytes, np.uint8)
    alike = np.ones(_SAMPLE_WIDTH, np.float32)
    importance = alike.ctypes.data if kind in _NEED_IMPORTANCE else None

    def once() -> float:
        started = time.thread_time()
        quantize(number, values.ctypes.data, room.ctypes.data, 0, _SAMPLE_ROWS, _SAMPLE_WIDTH, importance)
        return time.thread_time() - started

    once()  # tables are made
    return min(once(), once()) / values.size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
