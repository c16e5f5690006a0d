"""llama.cpp's own writer, which servers pass GGUFs through."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from kolotune.foundation import shared_libraries
from kolotune.gguf import header

_ALIGNMENT = 32
_GUESSED, _F32, _F16, _BF16 = 1024, 0, 1, 32  # llama.cpp's numbers for what a file without a type seems to be
_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p


class _InitParameters(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.POINTER(_POINTER)))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "gguf_init_from_file": (_POINTER, _TEXT, _InitParameters),
    "gguf_init_empty": (_POINTER,),
    "gguf_set_kv": (None, _POINTER, _POINTER),
    "gguf_set_val_u32": (None, _POINTER, _TEXT, ctypes.c_uint32),
    "gguf_remove_key": (ctypes.c_int64, _POINTER, _TEXT),
    "gguf_add_tensor": (None, _POINTER, _POINTER),
    "gguf_get_meta_size": (ctypes.c_size_t, _POINTER),
    "gguf_get_meta_data": (None, _POINTER, _POINTER),
    "ggml_get_tensor": (_POINTER, _POINTER, _TEXT),
}


def copy_gguf(source: Path, target: Path) -> Path:
    """Return what ``llama-quantize SOURCE TARGET COPY`` writes: ggml's functions write it, called as that does."""
    content = source.read_bytes()
    reader = header.read_whole(content, source)
    context = _POINTER()
    before = _call("gguf_init_from_file", str(source).encode(), _InitParameters(True, ctypes.pointer(context)))
    after = _call("gguf_init_empty")
    _call("gguf_set_kv", after, before)
    _call("gguf_set_val_u32", after, b"general.quantization_version", 2)
    _call("gguf_set_val_u32", after, b"general.file_type", _file_type(reader.summary()))
    for name in ("split.no", "split.count", "split.tensors.count"):
        _call("gguf_remove_key", after, name.encode())
    names = sorted(reader.tensors, key=lambda name: (_layer(name), name.encode()))
    for name in names:
        _call("gguf_add_tensor", after, _call("ggml_get_tensor", context, name.encode()))
    metadata = ctypes.create_string_buffer(_call("gguf_get_meta_size", after))
    _call("gguf_get_meta_data", after, metadata)
    with target.open("wb") as file:
        file.write(metadata.raw)
        for name in names:
            start = reader.start + reader.tensors[name].offset
            data = content[start : start + reader.tensors[name].size]
            file.write(data.ljust(-(-len(data) // _ALIGNMENT) * _ALIGNMENT, b"\0"))
    return target


def is_kept(path: Path) -> bool:
    """Whether llama.cpp's writer leaves a GGUF as it is; its copy is written beside it."""
    return copy_gguf(path, path.with_suffix(".copy")).read_bytes() == path.read_bytes()


def _call(name: str, *arguments: Any) -> Any:
    function: Any = shared_libraries.function_in(shared_libraries.load(), name)
    function.restype, *function.argtypes = _SIGNATURES[name]
    return function(*arguments)


def _layer(name: str) -> int:
    number = ctypes.c_int(-1)
    ctypes.CDLL(None).sscanf(name.encode(), b"blk.%d.", ctypes.byref(number))
    return number.value


def _file_type(summary: header.GgufSummary) -> int:
    kinds = [tensor.type for tensor in summary.tensors.values()]
    guess = {"F32": _F32, "F16": _F16, "BF16": _BF16}.get(max(kinds, key=kinds.count), _F32)
    return summary.integer("general.file_type", guess | _GUESSED)
