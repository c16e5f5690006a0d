"""The header of a quantized GGUF, as llama.cpp's own writer writes it."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping

from kolotune.foundation.quantization_types import FILE_TYPES

from . import header
from .header import HeaderReader
from .writer_form import FILE_TYPE, QUANTIZATION_VERSION, SPLIT, significant

ALIGNMENT = 32
_VERSION = 3
_UINT32, _STRING, _ARRAY = 4, 8, 9


def quantized_header(data: mmap.mmap | bytes, source: HeaderReader, types: Mapping[str, str], file_type: str) -> bytes:
    """Return everything that comes before the first tensor's data, padding included.

    Args:
        data: the unquantized GGUF, or its header alone.
        source: what was read from it.
        types: the type of each tensor, in the order of the file.
        file_type: name of the quantization.
    """
    import gguf

    dropped = {*SPLIT, QUANTIZATION_VERSION, FILE_TYPE}
    fields = {name: _c_texts(data[span]) for name, span in source.spans.items() if name not in dropped}
    fields[QUANTIZATION_VERSION] = struct.pack("<II", _UINT32, gguf.GGML_QUANT_VERSION)
    fields[FILE_TYPE] = struct.pack("<II", _UINT32, FILE_TYPES[file_type])
    parts = [struct.pack("<4sIQQ", b"GGUF", _VERSION, len(types), len(fields))]
    for name, value in fields.items():
        parts += _text(name), value
    offset = 0
    for name, kind in types.items():
        shape = source.tensors[name].shape
        sizes = significant(shape[::-1])[::-1]
        parts += _text(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        parts.append(struct.pack("<IQ", header.type_number(kind), offset))
        offset += aligned(header.size_of(shape, kind))
    content = b"".join(parts)
    return content.ljust(aligned(len(content)), b"\0")


def aligned(size: int) -> int:
    """Return the size with padding."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _c_texts(value: bytes) -> bytes:
    """Return a field's type and value, in which each text ends at its first NUL, as C reads it."""
    (kind,) = struct.unpack_from("<I", value)
    if kind == _STRING:
        return value[:4] + _up_to_nul(value, 4)[0]
    if kind != _ARRAY or struct.unpack_from("<I", value, 4) != (_STRING,):
        return value
    (count,) = struct.unpack_from("<Q", value, 8)
    parts, position = [value[:16]], 16
    for _ in range(count):
        text, position = _up_to_nul(value, position)
        parts.append(text)
    return b"".join(parts)


def _up_to_nul(value: bytes, position: int) -> tuple[bytes, int]:
    """Return the text at a position with its length in front, cut at its first NUL, and the position behind it."""
    (length,) = struct.unpack_from("<Q", value, position)
    start, end = position + 8, position + 8 + length
    nul = value.find(b"\0", start, end)
    if nul < 0:
        return value[position:end], end
    return struct.pack("<Q", nul - start) + value[start:nul], end
