"""Trace llama.cpp's converter: ``python -m … ROOT FOLDER TYPE TARGET``.

A separate process, because the converter's imports take seconds and hundreds of megabytes. ROOT is the converter's
folder, FOLDER a model folder whose weight files need no more than headers, TYPE the type of the GGUF, TARGET the folder
that the plan is written to.

Nothing about an architecture is known here. Header and metadata are what the converter writes, in the form of
llama.cpp's own writer (`writer_form`). How a tensor is made
from the model's is found by sending marked tensors through the converter's `modify_tensors`. An access to a weight's
value, after which other weights could give another plan, ends the attempt. See docs/conversion-plan.md.
"""

from __future__ import annotations

import base64
import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kolotune.foundation import typed_storage
from kolotune.foundation.errors import ToolchainError
from kolotune.runners import child_process
from kolotune.weights.dtypes import FLOATS
from kolotune.weights.safetensors_header import read_header

from . import converter_settings, writer_form
from .conversion_plan import TensorPlan
from .plan_cache import HEADER, PLAN, StoredPlan

if TYPE_CHECKING:
    import gguf
    from torch import Tensor

_LARGEST_CONSTANT = 1 << 20
_LARGEST_EXACT = 1 << 24  # whole numbers up to here are exact in fp32
ModifyTensors: TypeAlias = "Callable[[Any, str, int | None], Iterable[tuple[str, Any]]]"


class NoPlanError(Exception):
    """The GGUF can't be streamed: a tensor is more than another one with its rows permuted or a number added."""


class _Converter(Protocol):
    """What is used of a model class of llama.cpp's converter."""

    model_tensors: Mapping[str, Callable[[], Any]]
    modify_tensors: ModifyTensors
    gguf_writer: gguf.GGUFWriter

    def prepare_tensors(self) -> None: ...

    def prepare_metadata(self, vocab_only: bool) -> None: ...


@dataclass(frozen=True)
class RowTransform:
    """How the converter changes a tensor; see the fields of `TensorPlan`."""

    order: tuple[int, ...] | None = None
    added: float = 0.0


def main(arguments: list[str]) -> int:
    """Trace; return the exit code."""
    root, folder, gguf_type, target = arguments
    return child_process.carry_out(lambda: trace(Path(root), Path(folder), gguf_type, Path(target)))


def trace(root: Path, folder: Path, gguf_type: str, target: Path) -> None:
    """Write the plan, or the reason why there is none, into the folder `target`.

    Raises:
        ToolchainError: the converter does not know the architecture.
    """
    sys.path[:0] = [str(root / "gguf-py"), str(root)]
    logging.basicConfig(level=logging.INFO)
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]

    converter_settings.give_file_settings(ModelBase)
    with torch.inference_mode():
        architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
        try:
            model_class = get_model_class(architecture)
        except NotImplementedError:
            raise ToolchainError(f"llama.cpp's converter does not support {architecture}") from None
        converter_settings.leave_out_missing_drafts(model_class, folder)
        try:
            plan = StoredPlan(_traced(model_class, folder, gguf_type, target / HEADER))
        except NoPlanError as error:
            plan = StoredPlan(reason=str(error))
    typed_storage.write(target / PLAN, plan)


def _traced(
    model_class: Callable[..., _Converter], folder: Path, gguf_type: str, header: Path
) -> tuple[TensorPlan, ...]:
    """Write the header of the GGUF; return how its tensors are made."""
    import gguf
    from conversion.base import LazyTorchTensor  # type: ignore[import-not-found]

    _forbid_values(LazyTorchTensor)
    model = model_class(folder, gguf.LlamaFileType(writer_form.FILE_TYPES[gguf_type]), header)
    model = getattr(model, "impl", model)  # Mistral 3's class only hands on to another one
    modify = model.modify_tensors
    sources: dict[str, list[tuple[str, int | None]]] = {}

    def recording(data: Any, name: str, block: int | None) -> Iterator[tuple[str, Any]]:
        for new, values in modify(data, name, block):
            sources.setdefault(new, []).append((name, block))
            yield new, values

    known = dict(model.model_tensors)
    model.modify_tensors = recording
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    if dict(model.model_tensors) != known or len(model.gguf_writer.tensors) != 1 or not model.gguf_writer.tensors[0]:
        raise NoPlanError("the converter changes the list of tensors")
    names = _names_by_offset(folder)
    positions = {name: _position(load(), LazyTorchTensor) for name, load in known.items()}
    tensors: dict[str, TensorPlan] = {}
    for name, info in model.gguf_writer.tensors[0].items():
        if len(sources.get(name, ())) != 1:
            raise NoPlanError(f"{name} is not made of one tensor")
        source, block = sources[name][0]
        if info.dtype.name not in ("F32", "F16", "BF16"):
            raise NoPlanError(f"{name} is of type {info.dtype.name}")
        if source not in known:
            tensors[name] = TensorPlan(name, info.dtype.name, info.nbytes, constant=_constant(info))
            continue
        position = positions[source]
        if position is None:
            raise NoPlanError(f"{name} is computed before it is converted")
        stored = names[position.data_range.filename.name, position.data_range.offset]
        convert = partial(_converted, modify, name, source, block)
        transform = recognise(convert, name, tuple(position.shape), position.dtype)
        if tuple(info.shape) != tuple(position.shape) or position.dtype not in FLOATS:
            raise NoPlanError(f"{name} has another shape or type than {source}")
        tensors[name] = TensorPlan(name, info.dtype.name, info.nbytes, stored, transform.order, transform.added)
    if writer_form.wanted_form() is writer_form.Form.WRITER:
        writer_form.arrange(model.gguf_writer, gguf_type)
    in_order = tuple(tensors[name] for name in model.gguf_writer.tensors[0])
    _write_header(model.gguf_writer, header)
    return in_order


def _names_by_offset(folder: Path) -> dict[tuple[str, int], str]:
    """Return the names of the folder's tensors, by file and offset of their data."""
    names = {}
    for path in folder.glob("*.safetensors"):
        header = read_header(path)
        for entry, (start, _) in zip(header.entries, header.offsets, strict=True):
            names[path.name, len(header.content) + start] = entry.name
    return names


def _forbid_values(lazy_tensor: Any) -> None:
    """From now on the folder's tensors have a shape and a dtype; computing with their values raises an error."""
    original = lazy_tensor.from_local_tensor

    def refuse(_: object) -> None:
        raise NoPlanError("the converter looks at a weight's value")

    def from_local_tensor(tensor: object) -> Any:
        lazy = original(tensor)
        lazy._func = refuse
        return lazy

    lazy_tensor.from_local_tensor = staticmethod(from_local_tensor)


def _position(tensor: Any, lazy_tensor: Any) -> gguf.utility.LocalTensor | None:
    """Return where in its file a tensor of the folder lies; None for one that has been computed."""
    import gguf

    if type(tensor) is not lazy_tensor or len(tensor._args) != 1:
        return None
    return tensor._args[0] if isinstance(tensor._args[0], gguf.utility.LocalTensor) else None


def _constant(info: Any) -> str:
    """Return the data of a tensor that depends on the config alone."""
    import gguf

    if info.nbytes > _LARGEST_CONSTANT:
        raise NoPlanError("a tensor that the converter makes is large")
    return base64.b64encode(gguf.LazyNumpyTensor.to_eager(info.tensor).tobytes()).decode()


def _converted(modify: ModifyTensors, name: str, source: str, block: int | None, values: Tensor) -> Tensor:
    """Return the tensor `name` that the converter makes from these values of the source."""
    results: list[Tensor] = [out for new, out in modify(values, source, block) if new == name]
    if len(results) != 1:
        raise NoPlanError(f"{name} depends on tensors before it")
    return results[0]


def recognise(convert: Callable[[Tensor], Tensor], name: str, shape: tuple[int, ...], dtype: str) -> RowTransform:
    """Find how the converter changes a tensor.

    Marked tensors show which row a value came from, and random values confirm it. All are expanded views that take no
    memory; a result that is the same view was not touched.

    Args:
        convert: the converter's function.
        name: of the tensor, for messages.
        shape, dtype: of the model's tensor.

    Raises:
        NoPlanError: it does more than permute rows and add a number.
    """
    import torch

    if not shape or 0 in shape or math.prod(shape[1:]) > _LARGEST_EXACT or shape[0] > _LARGEST_EXACT:
        raise NoPlanError(f"{name} has a shape that can't be marked")
    count, inner = shape[0], shape[1:]
    numbers = torch.arange(count, dtype=torch.float32).reshape(count, *(1 for _ in inner)).expand(shape)
    result = convert(numbers)
    same = result.shape == numbers.shape and result.stride() == numbers.stride() and result.dtype is numbers.dtype
    if same and result.data_ptr() == numbers.data_ptr():
        if len(shape) == 1 and not torch.equal(result, torch.arange(count, dtype=torch.float32)):
            raise NoPlanError(f"{name} is changed in place")
        return RowTransform()
    added = float(convert(torch.zeros(()).expand(shape)).reshape(-1)[0])
    order = (result.reshape(len(result), -1)[:, 0] - added).to(torch.int64) if result.dim() else result
    if result.shape != numbers.shape or not torch.equal(order.sort().values, torch.arange(count)):
        raise NoPlanError(f"{name} is no permutation of rows")
    _confirm(convert, name, shape, dtype, order, added)
    unchanged = torch.equal(order, torch.arange(count))
    return RowTransform(None if unchanged else tuple(order.tolist()), added)


def _confirm(
    convert: Callable[[Tensor], Tensor], name: str, shape: tuple[int, ...], dtype: str, order: Tensor, added: float
) -> None:
    """Compare the recognised transform with the converter's result for random values."""
    import torch

    stored = {"F16": torch.float16, "BF16": torch.float32, "F32": torch.float32, "F64": torch.float32}.get(dtype)
    if stored is None:
        raise NoPlanError(f"{name} is stored as {dtype}")
    generator = torch.Generator().manual_seed(1)
    # We add in fp32 however narrow the tensor is: that is what the trained model computes.
    for kind in {torch.float32, torch.float32 if added else stored}:
        rows = torch.randn(shape[0], generator=generator).to(kind).reshape(shape[0], *(1 for _ in shape[1:]))
        columns = (torch.randn(shape[1:], generator=generator) * 1e-3).to(kind)
        for probe, expected in ((rows.expand(shape), rows[order]), (columns.expand(shape), columns)):
            if not torch.equal(convert(probe), (expected + added if added else expected).expand(shape)):
                raise NoPlanError(f"{name} is more than a permutation of rows")


def _write_header(writer: gguf.GGUFWriter, path: Path) -> None:
    """Write all that the converter writes before the first tensor's data."""
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file in writer.fout or ():
        writer.write_padding(file, file.tell())
    writer.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
