"""fp32 to f16, by the function that llama.cpp's own tools use; numpy takes some forty times as long."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_NAMES = ("libggml-cpu.so", "libggml-cpu.dylib", "ggml-cpu.dll")


def from_f32(values: np.ndarray) -> np.ndarray:
    """fp32 values as f16, rounded to the nearest (of two as near ones to the even one); too large ones get infinite."""
    import numpy as np

    convert = _of_ggml()
    if convert is None:
        return values.astype(np.float16)
    values = np.ascontiguousarray(values)
    halves = np.empty(values.shape, np.float16)
    convert(values.ctypes.data, halves.ctypes.data, values.size)
    return halves


@functools.cache
def _of_ggml() -> Callable[[int, int, int], None] | None:
    """The function of llama-cpp-python's library; None where there is none that rounds as numpy does."""
    import numpy as np

    try:
        package = importlib.util.find_spec("llama_cpp")
        folders = [Path(each) / "lib" for each in (package.submodule_search_locations or ())] if package else []
        library = ctypes.CDLL(
            str(next(folder / name for folder in folders for name in _NAMES if (folder / name).is_file()))
        )
        found: Any = library.ggml_cpu_fp32_to_fp16
    except (StopIteration, OSError, AttributeError, ImportError, ValueError):
        return None
    found.argtypes, found.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    tried = np.concatenate([every, -every, (every[1:] + every[:-1]) / 2])  # and what lies midway
    halves = np.empty(tried.shape, np.float16)
    found(tried.ctypes.data, halves.ctypes.data, tried.size)
    right = np.array_equal(halves.view(np.uint16), tried.astype(np.float16).view(np.uint16))
    convert: Callable[[int, int, int], None] = found
    return convert if right else None
