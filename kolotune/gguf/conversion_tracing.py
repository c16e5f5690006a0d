"""Draws a model's outline with llama.cpp's own converter: ``python -m … ROOT FOLDER KIND TARGET``.

A process of its own: what it imports takes seconds and hundreds of megabytes. ROOT is the converter's folder, FOLDER a
model folder whose weights need no values, KIND the type of the GGUF, TARGET the outline to make (see `outline`).

What the converter writes is taken from it, not known here: header and key-values as they are, and how each tensor
comes out of the folder's by giving its `modify_tensors` marked tensors. Any look at a weight's value on the way,
which could make the answer another one for other weights, ends the attempt.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from kolotune.runners.watchdog import end_with_parent

from .conversion_plan import HEADER, PLAN, Looked, NotSimple

_KINDS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_LARGEST_CONSTANT = 1 << 20
_LARGEST_EXACT = 1 << 24  # whole numbers that fp32 holds


def main(arguments: list[str]) -> int:
    """Makes the outline; 1 when the converter does not know the architecture."""
    end_with_parent()
    root, folder, kind, target = arguments
    sys.path[:0] = [str(Path(root, "gguf-py")), root]
    logging.basicConfig(level=logging.INFO)
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class  # type: ignore[import-not-found]

    with torch.inference_mode():
        parameters = ModelBase.load_hparams(Path(folder), False)
        architecture = get_model_architecture(parameters, ModelType.TEXT)
        try:
            kind_of_model = get_model_class(architecture)
        except NotImplementedError:
            print(f"Model {architecture} is not supported")
            return 1
        try:
            plan: dict[str, Any] = {"tensors": _drawn(kind_of_model, Path(folder), kind, Path(target, HEADER))}
        except (NotSimple, Looked) as error:
            plan = {"reason": str(error)}
    Path(target, PLAN).write_text(json.dumps(plan) + "\n", encoding="utf-8")
    return 0


def _drawn(kind_of_model: Any, folder: Path, kind: str, header: Path) -> list[dict[str, Any]]:
    """Writes the header of the GGUF; returns how each of its tensors is made."""
    import gguf
    from conversion.base import LazyTorchTensor  # type: ignore[import-not-found]

    _forbid_looking(LazyTorchTensor)
    model = kind_of_model(folder, gguf.LlamaFileType[_KINDS[kind]], header)
    modify = model.modify_tensors
    sources: dict[str, list[tuple[str, int | None]]] = {}

    def noted(data: Any, name: str, block: int | None) -> Any:
        for new, values in modify(data, name, block):
            sources.setdefault(new, []).append((name, block))
            yield new, values

    known = dict(model.model_tensors)
    model.modify_tensors = noted
    model.prepare_tensors()
    model.prepare_metadata(vocab_only=False)
    if dict(model.model_tensors) != known or len(model.gguf_writer.tensors) != 1:
        raise NotSimple("the converter changes the list of tensors")
    files = {path: number for number, path in enumerate(sorted(folder.glob("*.safetensors")))}
    places = {name: _place(load(), LazyTorchTensor) for name, load in known.items()}
    tensors = []
    for name, info in model.gguf_writer.tensors[0].items():
        made_of = sources.get(name, [])
        told: dict[str, Any] = {"name": name, "type": info.dtype.name, "shape": list(info.shape), "size": info.nbytes}
        if len(made_of) != 1:
            raise NotSimple(f"{name} is not made of one tensor")
        source, block = made_of[0]
        if source not in known:
            told["constant"] = _constant(info)
        elif (place := places[source]) is None or place.data_range.filename not in files:
            raise NotSimple(f"{name} is computed before it is converted")
        else:
            told["file"] = place.data_range.filename.name
            told["offset"] = place.data_range.offset
            told |= _how_it_is_made(partial(_made, modify, name, source, block), name, tuple(place.shape), place.dtype)
            if tuple(info.shape) != tuple(place.shape):
                raise NotSimple(f"{name} has another shape than {source}")
        tensors.append(told)
    _write_header(model.gguf_writer, header)
    return tensors


def _forbid_looking(lazy_tensor: Any) -> None:
    """From now on a folder's tensor has a shape and a dtype; who computes with its values gets an error."""
    made = lazy_tensor.from_local_tensor

    def refuse(_: Any) -> Any:
        raise Looked("the converter looks at a weight's values")

    def from_local_tensor(tensor: Any) -> Any:
        lazy = made(tensor)
        lazy._func = refuse
        return lazy

    lazy_tensor.from_local_tensor = staticmethod(from_local_tensor)


def _place(tensor: Any, lazy_tensor: Any) -> Any:
    """Where a tensor of the folder lies in its file; None for one that has been computed with."""
    import gguf

    if type(tensor) is not lazy_tensor or len(tensor._args) != 1:
        return None
    return tensor._args[0] if isinstance(tensor._args[0], gguf.utility.LocalTensor) else None


def _constant(info: Any) -> str:
    """The bytes of a tensor that is made of the config alone."""
    import gguf

    if info.nbytes > _LARGEST_CONSTANT:
        raise NotSimple("a tensor that is made by the converter is large")
    return base64.b64encode(gguf.LazyNumpyTensor.to_eager(info.tensor).tobytes()).decode()


def _made(modify: Any, name: str, source: str, block: int | None, values: Any) -> Any:
    """What the converter makes of the source's values as tensor `name`."""
    found = [out for new, out in modify(values, source, block) if new == name]
    if len(found) != 1:
        raise NotSimple(f"{name} depends on what came before")
    return found[0]


def _how_it_is_made(made: Callable[[Any], Any], name: str, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """{}: as it is; "order": row i of the GGUF is row order[i] of the source; "add": a number is added.

    Found with tensors that say which row and column a value came from, and held against random values. They are
    expanded, so that they take no memory: what comes back as the same view was not touched.
    """
    import torch

    if not shape or 0 in shape or math.prod(shape[1:]) > _LARGEST_EXACT or shape[0] > _LARGEST_EXACT:
        raise NotSimple(f"{name} is no vector or matrix that can be marked")
    count, inner = shape[0], shape[1:]
    numbers = torch.arange(count, dtype=torch.float32).reshape(count, *(1 for _ in inner)).expand(shape)
    found = made(numbers)
    same = found.shape == numbers.shape and found.stride() == numbers.stride() and found.dtype is numbers.dtype
    if same and found.data_ptr() == numbers.data_ptr():
        if len(shape) == 1 and not torch.equal(found, torch.arange(count, dtype=torch.float32)):
            raise NotSimple(f"{name} is changed where it lies")
        return {}
    added = float(made(torch.zeros(()).expand(shape)).reshape(-1)[0])
    order = (found.reshape(len(found), -1)[:, 0] - added).to(torch.int64) if found.dim() else found
    if found.shape != numbers.shape or not torch.equal(order.sort().values, torch.arange(count)):
        raise NotSimple(f"{name} is no permutation of rows")
    _hold_against_random_values(made, name, shape, dtype, order, added)
    in_order = torch.equal(order, torch.arange(count))
    return ({} if in_order else {"order": order.tolist()}) | ({"add": added} if added else {})


def _hold_against_random_values(
    made: Callable[[Any], Any], name: str, shape: tuple[int, ...], dtype: str, order: Any, added: float
) -> None:
    import torch

    stored = {"F16": torch.float16, "BF16": torch.float32, "F32": torch.float32, "F64": torch.float32}.get(dtype)
    if stored is None:
        raise NotSimple(f"{name} is stored as {dtype}")
    generator = torch.Generator().manual_seed(1)
    # An added number is added in fp32 here, however narrow the tensor: that is what the trained model computes.
    for kind in {torch.float32, torch.float32 if added else stored}:
        rows = torch.randn(shape[0], generator=generator).to(kind).reshape(shape[0], *(1 for _ in shape[1:]))
        columns = (torch.randn(shape[1:], generator=generator) * 1e-3).to(kind)
        for probe, wanted in ((rows.expand(shape), rows[order]), (columns.expand(shape), columns)):
            if not torch.equal(made(probe), (wanted + added if added else wanted).expand(shape)):
                raise NotSimple(f"{name} is more than a permutation of rows")


def _write_header(writer: Any, path: Path) -> None:
    """All that the converter writes before the first tensor's data."""
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file in writer.fout:
        writer.write_padding(file, file.tell())
    writer.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
