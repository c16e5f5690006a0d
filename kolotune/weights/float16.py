"""Convert fp32 to f16 with the function that llama.cpp's own tools use.

numpy gives the same bits but takes about forty times as long, which would be most of the time of a merge.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kolotune.foundation import shared_libraries
from kolotune.foundation.errors import ToolchainError

if TYPE_CHECKING:
    import numpy as np

_NAMES = ("ggml_cpu_fp32_to_fp16", "ggml_fp32_to_fp16_row")  # the first is the faster one


def from_f32(values: np.ndarray) -> np.ndarray:
    """Return fp32 values as f16, rounded to nearest, ties to even; values out of range become infinite."""
    import numpy as np

    convert = _ggml_function()
    if convert is None:
        return values.astype(np.float16)
    values = np.ascontiguousarray(values)
    result = np.empty(values.shape, np.float16)
    convert(values.ctypes.data, result.ctypes.data, values.size)
    return result


@functools.cache
def _ggml_function() -> Callable[[int, int, int], None] | None:
    """Return the function of llama.cpp's library; None when there is none that rounds as numpy does."""
    import numpy as np

    try:
        libraries = shared_libraries.load()
    except ToolchainError:
        return None
    convert = next(filter(None, (shared_libraries.function_in(libraries, name) for name in _NAMES)), None)
    if convert is None:
        return None
    convert.argtypes, convert.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    # Compare with numpy: every finite f16 value, and the midpoints between neighbours.
    exact = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    values = np.concatenate([exact, -exact, (exact[1:] + exact[:-1]) / 2])
    result = np.empty(values.shape, np.float16)
    convert(values.ctypes.data, result.ctypes.data, values.size)
    agrees = np.array_equal(result.view(np.uint16), values.astype(np.float16).view(np.uint16))
    return cast("Callable[[int, int, int], None]", convert) if agrees else None
