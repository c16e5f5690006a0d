"""A model folder without the values of its weights: all that decides how llama.cpp converts it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.hashing import hash_file
from kolotune.weights.safetensors_header import read_header
from kolotune.weights.shards import Shard
from kolotune.weights.weight_files import weight_files

_LARGEST_FILE = 1 << 28  # bytes; a larger file of a model folder holds weights
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})


@dataclass(frozen=True)
class ModelSkeleton:
    """A model folder, complete but for the values of its weights.

    Attributes:
        name: the folder's name, which the converter may write into the GGUF.
        files: all files but the weights, by name: a file on disk, or its content.
        shards: names and headers of the weight files.
    """

    name: str
    files: Mapping[str, Path | str | bytes]
    shards: tuple[Shard, ...]

    def text(self, name: str) -> str:
        """Return the text of one of the `files`."""
        content = self.files[name]
        if isinstance(content, Path):
            return content.read_text(encoding="utf-8")
        return content.decode() if isinstance(content, bytes) else content

    def file_digest(self, name: str) -> str:
        """Return the SHA-256 of one of the `files`."""
        content = self.files[name]
        return hash_file(content) if isinstance(content, Path) else hashlib.sha256(_bytes(content)).hexdigest()

    def file_size(self, name: str) -> int:
        """Return the bytes of one of the `files`."""
        content = self.files[name]
        return content.stat().st_size if isinstance(content, Path) else len(_bytes(content))

    def digest(self) -> str:
        """Return a hash of everything that the converter's result depends on."""
        digest = hashlib.sha256(f"{self.name}\0".encode())
        for name in sorted(self.files):
            digest.update(f"{name}\0{self.file_digest(name)}\0".encode())
        for shard in self.shards:
            digest.update(f"{shard.name}\0".encode() + shard.header)
        return digest.hexdigest()[:32]

    def write(self, parent: Path, *, zeros: bool = False) -> Path:
        """Write the folder into `parent` and return it.

        Args:
            parent: an existing folder.
            zeros: extend the weight files to their full size with zeros that take no space on disk; otherwise they
                hold their headers only.
        """
        folder = parent / self.name
        folder.mkdir()
        for name, content in self.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, folder / name)
            else:
                (folder / name).write_bytes(_bytes(content))
        for shard in self.shards:
            (folder / shard.name).write_bytes(shard.header)
            if zeros:
                os.truncate(folder / shard.name, shard.size)
        return folder


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()


def read_skeleton(folder: Path) -> ModelSkeleton:
    """Read the skeleton of a model folder.

    Raises:
        ModelError: it has no whole safetensors files.
    """
    shards = []
    for path in weight_files(folder):
        header = read_header(path)
        shards.append(Shard(path.name, header.content, tuple(header.entries)))
    files: dict[str, Path | str | bytes] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in _WEIGHT_SUFFIXES and path.stat().st_size < _LARGEST_FILE
    }
    return ModelSkeleton(folder.absolute().name, files, tuple(shards))
