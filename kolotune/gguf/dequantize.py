"""Turn a quantized GGUF back into a model folder, so that an adapter is trained on the weights that are served.

The folder has the values of the file's weights in fp32, as ggml reads them, under the model's own names and in the
order of its own rows. Beside them are the blocks of the layers' matrices as they are in the file, for `--load-in-4bit`.
Config and tokenizer are those of the model that the GGUF was made from, whose weights show that it is the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.foundation.files import require_space
from kolotune.foundation.reporter import Reporter
from kolotune.weights import model_config, stored_blocks
from kolotune.weights.composite_models import is_composite
from kolotune.weights.dtypes import as_f32
from kolotune.weights.mapped_tensors import MappedTensors
from kolotune.weights.merge import MergedModel, companion_files
from kolotune.weights.model_shape import read_shape
from kolotune.weights.safetensors_header import Entry, make_header
from kolotune.weights.shards import split_into_shards, write_shards
from kolotune.weights.stored_blocks import StoredMatrix
from kolotune.weights.weight_files import weight_files

from . import convert, header
from .conversion_plan import TensorPlan, exact_type
from .model_skeleton import read_skeleton
from .stored_values import StoredValues

if TYPE_CHECKING:
    import numpy as np

_WHOLE = frozenset({"F32", "F16", "BF16"})
_OF_ROTARY = "rope_"  # tensors that llama.cpp's converter computes from the config
_APART = 0.5  # of the weights' size; quantized to two bits they are a third apart, and of another model all


@dataclass(frozen=True)
class Dequantized:
    """What a folder was made of.

    Attributes:
        tensors: how many weights.
        types: how many matrices of the layers are in blocks, by type.
    """

    tensors: int
    types: Mapping[str, int]


def dequantize(gguf: Path, base: Path, target: Path, log: Path, reporter: Reporter) -> Dequantized:
    """Make a model folder of a GGUF's weights.

    Args:
        gguf: the quantized file.
        base: folder of the model that it was made from.
        target: an existing empty folder.
        log: receives the converter's output.
        reporter: shows what is done.

    Raises:
        ArtifactError: the GGUF is damaged, or belongs to another model.
        ModelError: weights of such a model can't be found in a GGUF.
        ToolchainError: ggml can't read a type.
        SpaceError: the disk has no space for the folder.
    """
    plans = _plans(base, log, reporter)
    tensors = MappedTensors(weight_files(base))
    entries = [Entry(name, "F32", tensors.entries[name].shape) for name in tensors.entries if name in plans]
    with StoredValues(gguf) as values:
        _check_tensors(gguf, values, plans, tensors.entries)
        reader = _Reader(gguf, values, plans, tensors)
        matrices = list(reader.matrices(entries))
        require_space(target.parent, sum(entry.size for entry in [*entries, *(each.entry for each in matrices)]))
        write_shards(target, split_into_shards(entries), reader.blocks)
        _write_blocks(target / stored_blocks.FILE, matrices, reader)
    (target / model_config.FILE).write_text(MergedModel(None, base, "fp32").config_text(), encoding="utf-8", newline="")
    for name, source in companion_files(base, base).items():
        shutil.copyfile(source, target / name)
    types = [matrix.type for matrix in matrices]
    return Dequantized(len(entries), {kind: types.count(kind) for kind in sorted(set(types))})


def _plans(base: Path, log: Path, reporter: Reporter) -> dict[str, TensorPlan]:
    """Return where the GGUF has each of the model's weights."""
    other = "Train on the unquantized model; --load-in-4bit quantizes it for training."
    if is_composite(model_config.read_model_config(base)):
        raise ModelError(f"{base}: the GGUF of a composite model lacks a part of its weights", other)
    if read_shape(base).experts:
        raise ModelError(f"{base}: experts are not trained in the blocks of a GGUF", other)
    gguf_type = exact_type(MappedTensors(weight_files(base)).entries)
    plans = convert.tensor_plans(read_skeleton(base), gguf_type, log, reporter)
    if not plans:
        raise ModelError(f"{base}: llama.cpp's converter computes other matrices from its weights", other)
    return plans


def _check_tensors(
    gguf: Path, values: StoredValues, plans: Mapping[str, TensorPlan], entries: Mapping[str, Entry]
) -> None:
    """Refuse a GGUF that has other tensors than the model's."""
    hint = "Give the model that the GGUF was made from with --base."
    for source, plan in plans.items():
        if plan.name not in values.tensors:
            raise ArtifactError(f"{gguf}: has no tensor {plan.name}", hint)
        if values.tensors[plan.name].shape[::-1] != entries[source].shape:
            shapes = f"{values.tensors[plan.name].shape[::-1]}, where the model has {entries[source].shape}"
            raise ArtifactError(f"{gguf}: {plan.name} is {shapes}", hint)
    known = {plan.name for plan in plans.values()}
    unknown = [name for name in values.tensors if name not in known and not name.startswith(_OF_ROTARY)]
    if unknown:
        raise ArtifactError(f"{gguf}: has a tensor {unknown[0]}, which the model does not have", hint)


class _Reader:
    """The weights of a GGUF under the model's names."""

    def __init__(self, gguf: Path, values: StoredValues, plans: Mapping[str, TensorPlan], base: MappedTensors) -> None:
        self._gguf, self._values, self._plans, self._base = gguf, values, plans, base

    def blocks(self, entry: Entry) -> Iterator[np.ndarray]:
        """Yield the values of a weight, fp32, from first to last."""
        import numpy as np

        plan = self._plans[entry.name]
        whole = np.concatenate([rows for _, rows in self._values.blocks(plan.name)]).reshape(entry.shape)
        whole = _in_own_order(whole, plan)
        if plan.added:
            whole -= np.float32(plan.added)
        self._check(entry.name, whole)
        yield whole

    def _check(self, name: str, values: np.ndarray) -> None:
        """Refuse values that are far from those of the unquantized model."""
        import numpy as np

        expected = as_f32(self._base[name], self._base.entries[name].dtype)
        if not np.linalg.norm(values - expected) <= _APART * np.linalg.norm(expected) + np.finfo(np.float32).tiny:
            raise ArtifactError(
                f"{self._gguf}: {self._plans[name].name} has other values than the model's {name}",
                "Give the model that the GGUF was made from with --base.",
            )

    def matrices(self, entries: list[Entry]) -> Iterator[StoredMatrix]:
        """Yield the matrices of the layers that are in blocks."""
        for entry in entries:
            tensor = self._values.tensors[self._plans[entry.name].name]
            if len(entry.shape) == 2 and tensor.type not in _WHOLE and any(map(str.isdecimal, entry.name.split("."))):
                row_bytes = header.size_of((entry.shape[1],), tensor.type)
                yield StoredMatrix.of(entry.name, tensor.type, entry.shape[0], row_bytes)

    def rows(self, matrix: StoredMatrix) -> np.ndarray:
        """Return the blocks of a matrix, uint8 ``[rows, bytes]``; rows may change places, as no block is of two."""
        plan = self._plans[matrix.name]
        return _in_own_order(self._values.data(plan.name).reshape(matrix.entry.shape), plan)


def _in_own_order(rows: np.ndarray, plan: TensorPlan) -> np.ndarray:
    """Return rows of the GGUF in the order of the model's."""
    import numpy as np

    return rows if plan.order is None else rows[np.argsort(np.array(plan.order))]


def _write_blocks(path: Path, matrices: list[StoredMatrix], reader: _Reader) -> None:
    with path.open("wb") as file:
        file.write(make_header([matrix.entry for matrix in matrices]))
        for matrix in matrices:
            file.write(reader.rows(matrix).tobytes())
