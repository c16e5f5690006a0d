"""Tensors of a model folder: mapped into memory, read some rows at a time, written to files of a known layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kolotune.foundation.errors import ArtifactError, ModelError
from kolotune.foundation.files import Stream

from . import float16

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_SHARD_BYTES = 5_000_000_000
_LONGEST_HEADER = 100_000_000  # the format's own limit
_BLOCK = 1 << 18  # weights that are worked on at once: what a core's cache holds
# safetensors' names of dtypes, and numpy's; bfloat16, which numpy does not have, as the bits that it is.
_DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, each one's header checked.

    Raises:
        ModelError: there are none, one is missing from the index's list, or a header is damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise ModelError(f"{index}: can't be read", "Download the model again.") from None
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ModelError(f"{index}: names files outside the folder", "Download the model from its own page.")
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        found = f"only pickled ones ({pickled[0]}), which can run code and are never loaded" if pickled else "none"
        raise ModelError(f"{folder}: has no safetensors weights: {found}", "Convert the weights to safetensors first.")
    for path in files:
        check_header(path)
    return files


def check_header(path: Path) -> None:
    """Refuses a safetensors file that is cut or damaged.

    Raises:
        ModelError: it is.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not path.is_file():
            raise ModelError(f"{path}: is missing, though the index names it", "Download the model again.")
        with safe_open(path, framework="numpy") as handle:
            handle.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error})", "Download the model again.") from None


class TensorFiles:
    """The tensors of a model folder by name, each read when it is asked for.

    Raises:
        ArtifactError: a file is damaged.
    """

    def __init__(self, files: list[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        self._homes: dict[str, Any] = {}
        for path in files:
            try:
                handle: Any = safe_open(path, framework="pt")
                self._homes |= dict.fromkeys(handle.keys(), handle)
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{path}: can't be read: {error}", "Download the model again.") from error

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def read(self, name: str) -> Tensor:
        """The tensor of that name, in its stored dtype.

        Raises:
            ArtifactError: there is none.
        """
        if name not in self._homes:
            raise ArtifactError(f"the model has no tensor {name}", "Download the model again.")
        tensor: Tensor = self._homes[name].get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Entry:
    """A tensor as a file's header describes it; `dtype` in safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        import numpy as np

        count = np.dtype(_DTYPES[self.dtype]).itemsize
        for extent in self.shape:
            count *= extent
        return count

    @property
    def rows(self) -> int:
        """How many rows it has when all dimensions but the first one lie in a row; a scalar has one."""
        return self.shape[0] if self.shape else 1


class MappedTensors:
    """The tensors of safetensors files, mapped into memory: they take none of the process's own.

    Attributes:
        entries: all tensors by name, in the order of the files, and of the names in each.

    Raises:
        ArtifactError: a file is damaged, or a name stands in two of them.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._data: dict[str, np.ndarray] = {}
        for path in files:
            try:
                self._add(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{path}: can't be read: {error}", "Download the model again.") from error

    def _add(self, path: Path) -> None:
        import numpy as np

        header, begin = header_of(path)
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        for name, told in sorted(header.items()):
            if name in self.entries:
                raise ArtifactError(f"{path}: tensor {name} stands in two files", "Download the model again.")
            if told["dtype"] not in _DTYPES:
                raise ArtifactError(f"{path}: {name} is of type {told['dtype']}, which can't be merged or converted")
            entry = Entry(name, told["dtype"], tuple(told["shape"]))
            start, end = told["data_offsets"]
            if end - start != entry.size or begin + end > len(mapped):
                raise ValueError(f"{name} is not whole")
            self.entries[name] = entry
            self._data[name] = mapped[begin + start : begin + end].view(_DTYPES[entry.dtype]).reshape(entry.shape)

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor, in its stored dtype (bfloat16 as bits); it is the file itself, and can't be written to."""
        return self._data[name]


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's tensors as its header describes them, and where the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("its header is too long to be one")
        try:
            header = json.loads(file.read(length))
        except RecursionError:
            raise ValueError("its header is nested") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    header.pop("__metadata__", None)
    return header, 8 + length


def row_blocks(entry: Entry) -> Iterator[slice]:
    """The rows of a tensor in portions that a core's cache holds."""
    count = entry.rows
    width = max(entry.size // max(count, 1), 1)
    step = max(2 * _BLOCK // width, 1)
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def as_f32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values of a floating-point dtype as fp32; a copy, except of fp32."""
    import numpy as np

    if dtype == "BF16":
        bits: np.ndarray = np.left_shift(values, 16, dtype=np.uint32)
        return bits.view(np.float32)
    return values.astype(np.float32, copy=False)


def from_f32(values: np.ndarray, dtype: str) -> np.ndarray:
    """Finite fp32 values in a stored dtype, rounded to the nearest (of two as near ones to the even one)."""
    import numpy as np

    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    if dtype == "F16" and values.dtype == np.float32:
        return float16.from_f32(values)
    return values.astype(_DTYPES[dtype], copy=False)


@dataclass(frozen=True)
class Shard:
    """A safetensors file to be: its name, its header with the length before it, and the tensors in it."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


def shards_of(entries: Sequence[Entry], shard_bytes: int = _SHARD_BYTES) -> list[Shard]:
    """The files that hold the tensors, in their order, each of at most `shard_bytes` of tensors if it can be."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if filled and filled + entry.size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.size
    count = len(groups)
    names = (
        f"model-{at:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for at in range(1, count + 1)
    )
    return [Shard(name, _header(group), tuple(group)) for name, group in zip(names, groups, strict=True)]


def _header(entries: Sequence[Entry]) -> bytes:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        end = at + entry.size
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def write_shards(folder: Path, shards: Sequence[Shard], blocks: Callable[[Entry], Iterator[np.ndarray]]) -> None:
    """Writes the files into `folder`, and their index when there are several.

    Args:
        folder: an existing folder.
        shards: see `shards_of`.
        blocks: the values of a tensor in its dtype, from its beginning to its end, in any portions.
    """
    for shard in shards:
        with Stream(folder / shard.name) as stream:
            stream.write(shard.header)
            for entry in shard.entries:
                for block in blocks(entry):
                    stream.write(block)
    for name, text in index_of(shards).items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def index_of(shards: Sequence[Shard]) -> dict[str, str]:
    """The index that several files need: its name and text; of one file nothing."""
    if len(shards) < 2:
        return {}
    total = sum(entry.size for shard in shards for entry in shard.entries)
    homes = {entry.name: shard.name for shard in shards for entry in shard.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(homes.items()))}
    return {"model.safetensors.index.json": json.dumps(index, indent=2) + "\n"}
