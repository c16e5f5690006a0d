"""What a GGUF is besides its weights' values: its header, and how each tensor comes out of a model folder's.

Drawn once for each folder's config, tokenizer and shapes by llama.cpp's converter (`outlining`), and kept. With it the
weights are streamed into the GGUF by `write_gguf`, byte for byte as the converter writes them, without its imports.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.base_models.downloads import cache_folder
from kolotune.foundation.files import Stream, flush, hash_file, in_order, remove
from kolotune.llamacpp.toolchain import Toolchain
from kolotune.runners import local
from kolotune.weights.tensors import FLOATS, Entry, Shard, as_f32, from_f32, header_of, weight_files

if TYPE_CHECKING:
    import numpy as np

HEADER, PLAN = "header.gguf", "tensors.json"
_FORMAT = 1  # raised when outlines are drawn otherwise
_KEPT = 16
_ALIGNMENT = 32
_LARGEST_READ = 1 << 28  # bytes; a larger file of a model folder is weights
# The converter must find everything in the folder and ask nobody.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class NotSimple(Exception):
    """A tensor of the GGUF is not one of the folder's with its rows in another order or a number added."""


class Looked(Exception):
    """What the converter writes depends on the values of weights."""


@dataclass(frozen=True)
class Shape:
    """A model folder but for its weights' values.

    Attributes:
        name: the folder's name, which the converter may write into the GGUF.
        files: everything beside the weights: a file's name and where it is, or its text.
        shards: the weights' files.
    """

    name: str
    files: Mapping[str, Path | str]
    shards: tuple[Shard, ...]

    def text(self, name: str) -> str:
        """The text of one of the files."""
        content = self.files[name]
        return content.read_text(encoding="utf-8") if isinstance(content, Path) else content

    def digest(self) -> str:
        """Names all that the converter's answer depends on."""
        digest = hashlib.sha256(f"{self.name}\0{_FORMAT}\0".encode())
        for name, content in sorted(self.files.items()):
            known = hash_file(content) if isinstance(content, Path) else hashlib.sha256(content.encode()).hexdigest()
            digest.update(f"{name}\0{known}\0".encode())
        for shard in self.shards:
            digest.update(f"{shard.name}\0".encode() + shard.header)
        return digest.hexdigest()[:32]

    def written(self, parent: Path, *, zeros: bool = False) -> Path:
        """The folder, made in `parent`; its weights' files have headers only, or are zeros (and holes in the disk)."""
        folder = parent / self.name
        folder.mkdir()
        for name, content in self.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_text(content, encoding="utf-8", newline="")
        for shard in self.shards:
            (folder / shard.name).write_bytes(shard.header)
            if zeros:
                os.truncate(folder / shard.name, shard.size)
        return folder


def shape_of(folder: Path) -> Shape:
    """The shape of a model folder on the disk."""
    weights = weight_files(folder)
    shards = []
    for path in weights:
        described, begin = header_of(path)
        with path.open("rb") as file:
            header = file.read(begin)
        entries = (Entry(name, each["dtype"], tuple(each["shape"])) for name, each in described.items())
        shards.append(Shard(path.name, header, tuple(entries)))
    skipped = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
    files: dict[str, Path | str] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in skipped and path.stat().st_size < _LARGEST_READ
    }
    return Shape(folder.absolute().name, files, tuple(shards))


@dataclass(frozen=True)
class Made:
    """A tensor of the GGUF.

    Attributes:
        name: in the GGUF.
        dtype: of the GGUF, in safetensors' spelling (and as llama.cpp names it).
        size: bytes in the GGUF.
        source: the folder's tensor that it is made of; None: `constant`.
        order: row i is row order[i] of the source; None: all in the same order.
        add: what is added to each value.
        constant: the bytes.
    """

    name: str
    dtype: str
    size: int
    source: str | None = None
    order: tuple[int, ...] | None = None
    add: float = 0.0
    constant: bytes = b""


@dataclass(frozen=True)
class Outline:
    """The header of a GGUF, with padding, and its tensors in their order."""

    header: bytes
    tensors: tuple[Made, ...]


def hollow(outline: Outline, target: Path) -> None:
    """A GGUF with that header, and a hole in the disk where the weights are: as large as the real one."""
    target.write_bytes(outline.header)
    os.truncate(target, size_of(outline))


def size_of(outline: Outline) -> int:
    """Bytes of the GGUF."""
    return len(outline.header) + sum(made.size + -made.size % _ALIGNMENT for made in outline.tensors)


@dataclass(frozen=True)
class Verdict:
    """What the converter says of a folder: an outline, or why there is none; `code` is not 0 when it failed."""

    outline: Outline | None = None
    reason: str = ""
    code: int = field(default=0)


def draw(shape: Shape, kind: str, toolchain: Toolchain, log: Path) -> Verdict:
    """The outline of a GGUF of `kind` ("f16", "bf16" or "f32"), drawn the first time and kept.

    A user's own llama.cpp may change from one day to the next, and gets none.
    """
    if toolchain.version == "own":
        return Verdict(reason="the converter is not the pinned one")
    kept = place_of(shape, kind, toolchain)
    if (kept / PLAN).is_file():
        with suppress(OSError, ValueError, KeyError):
            return _read(kept, shape)
        remove(kept)
    with temporary(shape) as folder:
        drawn = folder.with_name(f"{folder.name}.outline")
        drawn.mkdir()
        argv = local.python("kolotune.gguf.conversion_tracing", str(toolchain.root), str(folder), kind, str(drawn))
        code = local.run(argv, log=log, env=OFFLINE, ends_with_parent=True)
        if code != 0:
            return Verdict(reason=local.last_lines(log), code=code)
        flush(drawn)
        with suppress(OSError):  # another process was quicker: its outline is the same
            drawn.rename(kept)
    _forget_old(kept)
    return _read(kept, shape)


def is_drawn(shape: Shape, kind: str, toolchain: Toolchain) -> bool:
    """Whether the converter's answer is known."""
    return (place_of(shape, kind, toolchain) / PLAN).is_file()


def place_of(shape: Shape, kind: str, toolchain: Toolchain) -> Path:
    """The folder that keeps what the converter said."""
    return cache_folder("conversions") / f"{shape.digest()}-{kind}-{toolchain.version}"


@contextmanager
def temporary(shape: Shape, *, zeros: bool = False) -> Iterator[Path]:
    """The folder of that shape, as long as the block lasts; see `Shape.written`."""
    room = cache_folder("conversions")
    room.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=room) as parent:
        yield shape.written(Path(parent), zeros=zeros)


def _forget_old(newest: Path) -> None:
    """A template that states the date gives one outline a day: only the last ones are kept."""
    others = [path for path in newest.parent.iterdir() if path != newest and (path / PLAN).is_file()]
    for path in sorted(others, key=lambda each: each.stat().st_mtime)[: 1 - _KEPT]:
        with suppress(OSError):
            remove(path)


def _read(folder: Path, shape: Shape) -> Verdict:
    plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if "reason" in plan:
        return Verdict(reason=plan["reason"])
    names: dict[tuple[str, int], Entry] = {}
    for shard in shape.shards:
        at = len(shard.header)
        described = json.loads(shard.header[8:])
        for entry in shard.entries:
            names[shard.name, at + described[entry.name]["data_offsets"][0]] = entry
    tensors = []
    for told in plan["tensors"]:
        source = None if "constant" in told else names[told["file"], told["offset"]]
        if told["type"] not in ("F32", "F16", "BF16") or (source and source.dtype not in FLOATS):
            return Verdict(reason=f"{told['name']} is of type {told['type']}")
        tensors.append(
            Made(
                told["name"],
                told["type"],
                told["size"],
                source.name if source else None,
                tuple(told["order"]) if "order" in told else None,
                told.get("add", 0.0),
                base64.b64decode(told.get("constant", "")),
            )
        )
    return Verdict(Outline((folder / HEADER).read_bytes(), tuple(tensors)))


def write_gguf(
    outline: Outline,
    target: Path,
    entries: Mapping[str, Entry],
    blocks: Callable[[Entry], Iterator[np.ndarray]],
) -> None:
    """Streams the weights into a GGUF.

    Args:
        outline: its header and tensors.
        target: the file to make.
        entries: the model's tensors by name, as in the shape that the outline was drawn of.
        blocks: the values of one of them in its dtype, some rows at a time.
    """
    with Stream(target) as stream:
        stream.write(outline.header)
        for made in outline.tensors:
            if made.source is None:
                stream.write(made.constant)
            else:
                for block in _values(made, entries[made.source], blocks):
                    stream.write(block)
            stream.write(b"\0" * (-made.size % _ALIGNMENT))


def _values(made: Made, entry: Entry, blocks: Callable[[Entry], Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    import numpy as np

    found = blocks(entry)
    if made.order is not None:  # rows from anywhere: of these tensors, which are not the largest, all are held
        whole = np.concatenate(list(found))
        found = iter([whole[np.array(made.order)]])
    if made.dtype == entry.dtype and not made.add:
        return found
    return in_order(partial(_converted, block, entry.dtype, made) for block in found)


def _converted(values: np.ndarray, dtype: str, made: Made) -> np.ndarray:
    import numpy as np

    wide = as_f32(values, dtype)
    with np.errstate(over="ignore"):  # an f16 that is asked for where a value is larger: infinite, as llama.cpp has it
        return from_f32(wide + np.float32(made.add) if made.add else wide, made.dtype)


def kind_of(entries: Mapping[str, Entry]) -> str:
    """The type of a GGUF that holds the matrices exactly."""
    kinds = {entry.dtype for entry in entries.values() if len(entry.shape) > 1}
    return {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}.get(frozenset(kinds), "f32")
