"""Write tensors to safetensors files: one, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kolotune.foundation.hashing import Hasher

from .safetensors_header import Entry, make_header
from .weight_files import INDEX

if TYPE_CHECKING:
    import numpy as np

_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Shard:
    """A safetensors file before its data is written.

    Attributes:
        name: the file's name.
        header: with the length in front.
        entries: the tensors in it.
    """

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


def split_into_shards(entries: Sequence[Entry], shard_bytes: int = _SHARD_BYTES) -> list[Shard]:
    """Distribute tensors, in their order, over files of at most `shard_bytes` (or one larger tensor)."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if filled and filled + entry.size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.size
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else ["model.safetensors"]
    return [Shard(name, make_header(group), tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_shards(
    folder: Path, shards: Sequence[Shard], blocks: Callable[[Entry], Iterator[np.ndarray]], hasher: Hasher | None = None
) -> None:
    """Write files, and their index when there are several.

    Args:
        folder: an existing folder.
        shards: see `split_into_shards`.
        blocks: yields the values of a tensor in its dtype, from first to last, in portions of any size.
        hasher: learns the hashes of the files.
    """
    hasher = hasher or Hasher()
    for shard in shards:
        with hasher.create(folder / shard.name) as file:
            file.write(shard.header)
            for entry in shard.entries:
                for block in blocks(entry):
                    file.write(block)
    for name, text in index_file(shards).items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def index_file(shards: Sequence[Shard]) -> dict[str, str]:
    """Return name and text of the index that several files need; {} for a single file."""
    if len(shards) < 2:
        return {}
    total = sum(entry.size for shard in shards for entry in shard.entries)
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: json.dumps(index, indent=2) + "\n"}
