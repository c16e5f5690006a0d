"""Reads a GGUF's header and checks that the file is whole, without loading the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError


@dataclass(frozen=True)
class GgufSummary:
    """What a GGUF says of itself.

    Attributes:
        architecture: as "llama".
        tensors: name → (shape as in the file, name of the type, bytes).
        fields: the metadata; long arrays are given by their length.
    """

    architecture: str
    tensors: dict[str, tuple[tuple[int, ...], str, int]]
    fields: dict[str, Any]


def read(path: Path) -> GgufSummary:
    """The summary of a GGUF whose tensors all lie inside the file.

    Raises:
        ArtifactError: it is no GGUF, or it is cut.
    """
    import gguf

    try:
        size = path.stat().st_size
        reader = gguf.GGUFReader(path)
        tensors: dict[str, tuple[tuple[int, ...], str, int]] = {}
        for tensor in reader.tensors:
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > size:
                raise ArtifactError(f"{path}: is cut (tensor {tensor.name} ends behind the file's end)")
            shape = tuple(int(extent) for extent in tensor.shape)
            tensors[str(tensor.name)] = (shape, tensor.tensor_type.name, int(tensor.n_bytes))
        fields = {name: _value(field) for name, field in reader.fields.items()}
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ArtifactError(f"{path}: is no whole GGUF ({error})") from None
    if not tensors or "general.architecture" not in fields:
        raise ArtifactError(f"{path}: holds no model")
    return GgufSummary(str(fields["general.architecture"]), tensors, fields)


def _value(field: Any) -> Any:
    import gguf

    if field.types and field.types[0] == gguf.GGUFValueType.ARRAY and len(field.data) > 64:
        return len(field.data)
    return field.contents()
