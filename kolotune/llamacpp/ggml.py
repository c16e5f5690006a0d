"""What is used of ggml, llama.cpp's library for tensors, beyond what llama-cpp-python declares."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ToolchainError

if TYPE_CHECKING:
    import numpy as np

_DIMENSIONS, _SOURCES, _PARAMETERS, _NAME = 4, 10, 16, 64


class Tensor(ctypes.Structure):
    """A ``struct ggml_tensor`` of the pinned version, as `tensor_at` proves."""


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


@functools.cache
def library() -> Any:
    """The library, with the functions that are used of it declared.

    Raises:
        ToolchainError: it does not stand beside llama-cpp-python.
    """
    import llama_cpp

    found = sorted(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base*"))
    if not found:
        raise ToolchainError("llama-cpp-python has no ggml library beside it")
    loaded: Any = ctypes.CDLL(str(found[0]))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    loaded.ggml_quantize_chunk.restype = size
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]
    loaded.ggml_get_name.restype, loaded.ggml_get_name.argtypes = ctypes.c_char_p, [pointer]
    loaded.ggml_nbytes.restype, loaded.ggml_nbytes.argtypes = size, [pointer]
    loaded.ggml_op_name.restype, loaded.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    loaded.ggml_backend_tensor_get.restype = None
    loaded.ggml_backend_tensor_get.argtypes = [pointer, pointer, size, size]
    return loaded


def tensor_at(address: int) -> Tensor:
    """The tensor at an address.

    Raises:
        ToolchainError: the library keeps its tensors otherwise than `Tensor` says.
    """
    found = Tensor.from_address(address)
    sources = [found.src[number] for number in range(2) if found.src[number]]
    for each in (found, *(source.contents for source in sources)):
        if library().ggml_get_name(ctypes.addressof(each)) != each.name:
            raise ToolchainError("the installed llama.cpp keeps its tensors in another form than the pinned one")
    return found


def values(tensor: Tensor, kind: type[np.generic]) -> np.ndarray:
    """A copy of a tensor's numbers, ``[ne3, ne2, ne1, ne0]``, wherever they are.

    Args:
        tensor: not quantized, and its rows may have gaps between them.
        kind: numpy's type of its numbers.
    """
    import numpy as np

    size = library().ggml_nbytes(ctypes.addressof(tensor))
    data = np.empty(size, np.uint8)
    library().ggml_backend_tensor_get(ctypes.addressof(tensor), data.ctypes.data, 0, size)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    return np.ndarray(shape, kind, data.data, strides=strides)
