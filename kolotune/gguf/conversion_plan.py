"""How a GGUF is written from a model's tensors: its header, and where each tensor's data comes from.

A plan is traced once from llama.cpp's converter (`conversion_tracing`) and kept (`plan_cache`). With it, `write_gguf`
streams weights into the file that the converter would write, in the form of llama.cpp's own writer (`writer_form`),
byte for byte, without the converter's imports. See docs/conversion-plan.md.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.hashing import Hasher
from kolotune.foundation.ordered_tasks import run_in_order
from kolotune.weights.dtypes import as_f32, from_f32
from kolotune.weights.safetensors_header import Entry

if TYPE_CHECKING:
    import numpy as np

_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the GGUF is made.

    Attributes:
        name: its name in the GGUF.
        dtype: its type in the GGUF: "F32", "F16" or "BF16".
        size: bytes in the GGUF, without padding.
        source: the model's tensor that it is made from; None for a constant.
        order: row i of the GGUF is row ``order[i]`` of the source; None keeps the order.
        added: number added to each value.
        constant: the data, in base64, of a tensor that depends on the config alone.
    """

    name: str
    dtype: str
    size: int
    source: str | None = None
    order: tuple[int, ...] | None = None
    added: float = 0.0
    constant: str = ""


@dataclass(frozen=True)
class ConversionPlan:
    """A GGUF without the values of its weights.

    Attributes:
        header: everything before the first tensor's data, padding included.
        tensors: in the order of the file.
    """

    header: bytes
    tensors: tuple[TensorPlan, ...]

    @property
    def size(self) -> int:
        """Bytes of the GGUF."""
        return len(self.header) + sum(tensor.size + _padding(tensor) for tensor in self.tensors)


def _padding(tensor: TensorPlan) -> int:
    return -tensor.size % _ALIGNMENT


def write_sparse_gguf(plan: ConversionPlan, target: Path) -> None:
    """Write a GGUF of full size whose weights are zeros that take no space on disk."""
    target.write_bytes(plan.header)
    os.truncate(target, plan.size)


def write_gguf(
    plan: ConversionPlan,
    target: Path,
    entries: Mapping[str, Entry],
    blocks: Callable[[Entry], Iterator[np.ndarray]],
    hasher: Hasher | None = None,
) -> None:
    """Stream weights into a GGUF.

    Args:
        plan: header and tensors.
        target: the file to write.
        entries: the model's tensors by name, as in the skeleton that the plan was traced from.
        blocks: yields the values of one of them in its dtype, some rows at a time.
        hasher: learns the hash of the file.
    """
    with (hasher or Hasher()).create(target) as stream:
        stream.write(plan.header)
        for tensor in plan.tensors:
            if tensor.source is None:
                stream.write(base64.b64decode(tensor.constant))
            else:
                for block in _values(tensor, entries[tensor.source], blocks):
                    stream.write(block)
            stream.write(b"\0" * _padding(tensor))


def _values(tensor: TensorPlan, entry: Entry, blocks: Callable[[Entry], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    import numpy as np

    values = blocks(entry)
    if tensor.order is not None:  # any row may be needed next; these tensors are not the largest, so hold all of it
        whole = np.concatenate(list(values))
        values = iter([whole[np.array(tensor.order)]])
    if tensor.dtype == entry.dtype and not tensor.added:
        return values
    return run_in_order(partial(_converted, block, entry.dtype, tensor) for block in values)


def _converted(values: np.ndarray, dtype: str, tensor: TensorPlan) -> np.ndarray:
    import numpy as np

    wide = as_f32(values, dtype)
    with np.errstate(over="ignore"):  # where a value does not fit f16 it becomes infinite, as in llama.cpp
        return from_f32(wide + np.float32(tensor.added) if tensor.added else wide, tensor.dtype)


def exact_type(entries: Mapping[str, Entry]) -> str:
    """Return the type of GGUF that holds all matrices exactly: "f16", "bf16" or "f32"."""
    dtypes = frozenset(entry.dtype for entry in entries.values() if len(entry.shape) > 1)
    return {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}.get(dtypes, "f32")
