"""The form in which llama.cpp's own writer leaves a GGUF: the order of tensors and fields, and how shapes are written.

A file in this form passes through that writer without a change, so a server that passes every GGUF through it, as
Ollama does, stores the bytes that were sent. llama.cpp's converter has a writer of its own, which keeps the model's
order; `arrange` changes what it is about to write. See docs/conversion-plan.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf

    from .header import GgufSummary

FACT = "form"
"""Name of the fact in the record of a conversion; records of earlier versions have none: `Form.CONVERTER`."""
SWITCH = "KOLOTUNE_GGUF_FORM"
FILE_TYPES: Mapping[str, int] = {"f32": 0, "f16": 1, "bf16": 32}
"""llama.cpp's numbers for the types of an unquantized GGUF."""
QUANTIZATION_VERSION, FILE_TYPE = "general.quantization_version", "general.file_type"
"""The last fields of a header."""
SPLIT = frozenset({"split.no", "split.count", "split.tensors.count"})
"""Fields of a file that is one of several."""
_LAYER = re.compile(r"blk\.(\d+)")


class Form(StrEnum):
    """How an unquantized GGUF is written; the values are on disk."""

    WRITER = "writer"
    CONVERTER = "converter"


def wanted_form() -> Form:
    """Return the form that GGUFs are written in: the writer's, unless the environment asks for the converter's."""
    return Form.CONVERTER if os.environ.get(SWITCH) == Form.CONVERTER else Form.WRITER


def arrange(writer: gguf.GGUFWriter, gguf_type: str) -> None:
    """Bring tensors and fields into the form of llama.cpp's own writer, before the converter writes any of them.

    Args:
        writer: the converter's, with all tensors and fields of a single file.
        gguf_type: "f32", "f16" or "bf16", for models whose converter does not say what it writes.
    """
    import gguf

    (tensors,), (fields,) = writer.tensors, writer.kv_data
    for tensor in tensors.values():
        tensor.shape = significant(tuple(tensor.shape))
    writer.tensors[0] = dict(sorted(tensors.items(), key=lambda item: position(item[0])))
    for field in fields.values():
        field.value = _as_c_strings(field.value)
    fields.pop(QUANTIZATION_VERSION, None)
    file_type = fields.pop(FILE_TYPE, None)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[gguf_type] if file_type is None else file_type.value)


def is_in_form(summary: GgufSummary) -> bool:
    """Whether a GGUF is in the form of llama.cpp's own writer, as far as its header's summary shows."""
    names = [*summary.tensors]
    return (
        names == sorted(names, key=position)
        and [*summary.fields][-2:] == [QUANTIZATION_VERSION, FILE_TYPE]
        and SPLIT.isdisjoint(summary.fields)
        and all(tensor.shape == significant(tensor.shape[::-1])[::-1] for tensor in summary.tensors.values())
    )


def position(name: str) -> tuple[int, str]:
    """Return the sort key of a tensor: outside of layers first, then by layer, then by name."""
    layer = _LAYER.match(name)
    return (int(layer[1]) if layer else -1, name)


def significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape, slowest dimension first, without the dimensions of 1 in front; at least one remains."""
    first = next((number for number, size in enumerate(shape) if size != 1), len(shape) - 1)
    return shape[max(0, first) :] or (1,)


def _as_c_strings(value: Any) -> Any:
    """Return a field's value as C reads it: a text ends at its first NUL."""
    if isinstance(value, str):
        return value.partition("\0")[0]
    if isinstance(value, list):
        return [item.partition(b"\0")[0] if isinstance(item, bytes) else _as_c_strings(item) for item in value]
    return value
