"""Tensors of a model folder, read one at a time and written one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import ArtifactError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

_SHARD_BYTES = 5_000_000_000
_ENTRY_BYTES = 160  # upper bound of a header entry beside its name
_NAMES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


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
        _check_header(path)
    return files


def _check_header(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ModelError(f"{path}: is missing, though the index names it", "Download the model again.")
    try:
        with safe_open(path, framework="numpy") as handle:
            handle.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path}: is damaged ({error})", "Download the model again.") from None


def tensors_in(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in the safetensors files, in the files' order, one in memory at a time.

    Raises:
        ArtifactError: a file is damaged, or a name stands in two of them.
    """
    from safetensors import SafetensorError, safe_open

    seen: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - no mapping
                    if name in seen:
                        raise ArtifactError(f"{path}: tensor {name} stands in two files", "Download the model again.")
                    seen.add(name)
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}: can't be read: {error}", "Download the model again.") from error


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


class ShardWriter:
    """Writes tensors as they come into safetensors files of at most 5 GB, and the index when there are several.

    A file's header stands before its data but is known only after it, so room is left for it: the format allows
    spaces at its end.

    Args:
        folder: an existing folder.
        names: the names of all tensors to come.
        shard_bytes: a file is closed before it grows larger.
    """

    def __init__(self, folder: Path, names: list[str], shard_bytes: int = _SHARD_BYTES) -> None:
        self._folder = folder
        self._room = -(-(sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names) + 64) // 8) * 8
        self._limit = shard_bytes
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor."""
        import torch

        size = tensor.numel() * tensor.element_size()
        if self._file is None or (self._end() and self._end() + size > self._limit):
            self._open()
        assert self._file is not None
        start = self._end()
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)
        self._shards[-1][name] = {
            "dtype": _NAMES[str(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + size],
        }
        self.total_bytes += size

    def close(self) -> list[Path]:
        """Writes the headers, gives the files their names and returns them."""
        self._finish()
        count = len(self._shards)
        paths = []
        weight_map: dict[str, str] = {}
        for number, header in enumerate(self._shards, 1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            paths.append(self._temporary(number).replace(self._folder / name))
            weight_map |= {tensor: name for tensor in header if tensor != "__metadata__"}
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return paths

    def _end(self) -> int:
        return max((each["data_offsets"][1] for each in self._shards[-1].values() if "shape" in each), default=0)

    def _temporary(self, number: int) -> Path:
        return self._folder / f"shard-{number:05d}.partial"

    def _open(self) -> None:
        self._finish()
        self._shards.append({"__metadata__": {"format": "pt"}})
        self._file = self._temporary(len(self._shards)).open("wb")
        self._file.write(b"\0" * (8 + self._room))

    def _finish(self) -> None:
        if self._file is None:
            return
        header = json.dumps(self._shards[-1], separators=(",", ":")).encode()
        if len(header) > self._room:
            raise ArtifactError("the header of a weights file does not fit", "This is a bug; report it.")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()
        self._file = None
