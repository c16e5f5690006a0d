"""What is left of the adapter's change in each quantization, by the part of the layers that a matrix is."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

from kolotune.fidelity.comparison import Comparison, MatrixSurvival

_LAYER = re.compile(r"blk\.\d+\.")


@dataclass(frozen=True)
class PartKept:
    """The shares of a part's change that are left in its matrices, over all layers.

    Attributes:
        mean, least, most: the shares.
        types: of the matrices, the most frequent first.
    """

    mean: float
    least: float
    most: float
    types: str


@dataclass(frozen=True)
class ChangeKept:
    """A quantization, and what is left in each part, by the part's name such as "attn_q"."""

    name: str
    parts: dict[str, PartKept]


def changes_kept(comparison: Comparison) -> list[ChangeKept]:
    """Return what is left in the quantizations for which that was measured."""
    return [ChangeKept(each.name, _by_part(each.matrices)) for each in comparison.quantizations if each.matrices]


def _by_part(matrices: tuple[MatrixSurvival, ...]) -> dict[str, PartKept]:
    parts: dict[str, list[MatrixSurvival]] = defaultdict(list)
    for matrix in matrices:
        parts[_LAYER.sub("", matrix.tensor).removesuffix(".weight")].append(matrix)
    return {part: _summary(found) for part, found in sorted(parts.items())}


def _summary(matrices: list[MatrixSurvival]) -> PartKept:
    kept = [matrix.change_kept for matrix in matrices]
    types = [matrix.type for matrix in matrices]
    names = sorted(set(types), key=lambda name: (-types.count(name), name))
    return PartKept(sum(kept) / len(kept), min(kept), max(kept), ", ".join(names))
