"""Number formats of stored weights, and their conversion from and to fp32.

bfloat16, which numpy does not have, is handled as its bits in uint16. The ml_dtypes package would do the same, but
nothing else here needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import float16

if TYPE_CHECKING:
    import numpy as np

NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""numpy's types, by safetensors' names."""
FLOATS = ("F64", "F32", "F16", "BF16")


def as_f32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values of a stored floating-point dtype as fp32; a copy unless they are fp32 already."""
    import numpy as np

    if dtype == "BF16":
        bits: np.ndarray = np.left_shift(values, 16, dtype=np.uint32)
        return bits.view(np.float32)
    return values.astype(np.float32, copy=False)


def from_f32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return finite fp32 values in a stored dtype, rounded to nearest, ties to even."""
    import numpy as np

    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    if dtype == "F16" and values.dtype == np.float32:
        return float16.from_f32(values)
    return values.astype(NUMPY_TYPES[dtype], copy=False)
