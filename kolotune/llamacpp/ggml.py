"""Functions and structures of ggml, llama.cpp's tensor library."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ToolchainError

from .library import load

if TYPE_CHECKING:
    import numpy as np

_DIMENSIONS, _SOURCES, _PARAMETERS, _NAME = 4, 10, 16, 64


class Tensor(ctypes.Structure):
    """The pinned version's ``struct ggml_tensor``; `tensor_at` checks that it fits."""


Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * _DIMENSIONS),
    ("nb", ctypes.c_size_t * _DIMENSIONS),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * _PARAMETERS),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * _SOURCES),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * _NAME),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


def library() -> Any:
    """Return an object that has ggml's functions as attributes.

    Raises:
        ToolchainError: llama.cpp's library is missing or can't be used.
    """
    return load()


def tensor_at(address: int) -> Tensor:
    """Return the tensor at an address.

    Raises:
        ToolchainError: the library has another memory layout than `Tensor`.
    """
    tensor = Tensor.from_address(address)
    sources = [tensor.src[number] for number in range(2) if tensor.src[number]]
    for checked in (tensor, *(source.contents for source in sources)):
        if library().ggml_get_name(ctypes.addressof(checked)) != checked.name:
            raise ToolchainError("the installed llama.cpp has another tensor layout than the pinned version")
    return tensor


def values(tensor: Tensor, kind: type[np.generic]) -> np.ndarray:
    """Copy a tensor's values, from whichever device, as ``[ne3, ne2, ne1, ne0]``.

    Args:
        tensor: not quantized; its rows may be apart in memory.
        kind: numpy's type of the values.
    """
    import numpy as np

    size = library().ggml_nbytes(ctypes.addressof(tensor))
    data = np.empty(size, np.uint8)
    library().ggml_backend_tensor_get(ctypes.addressof(tensor), data.ctypes.data, 0, size)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    return np.ndarray(shape, kind, data.data, strides=strides)
