"""Token sequences packed end to end; what several of them begin with in common is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from .sequence_packing import PackedSequence

_TOKENS_AT_ONCE = 1536  # of sequences that are computed together
_LEAST_SHARED = 8  # tokens; sharing fewer costs more than it saves


@dataclass(frozen=True)
class SharedSequences:
    """Some sequences as one.

    Attributes:
        packed: all tokens; none is a label.
        paths: for each sequence, int64: where its tokens are.
        repeats: in how many sequences each token is, fp32 ``[tokens, 1]``.
    """

    packed: PackedSequence
    paths: list[Tensor]
    repeats: Tensor


def group_sequences(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield groups of sequences, as indices, to compute together: of `_TOKENS_AT_ONCE` at most, or one longer one."""
    group: list[int] = []
    tokens = 0
    for number, sequence in enumerate(sequences):
        if group and tokens + len(sequence) > _TOKENS_AT_ONCE:
            yield group
            group, tokens = [], 0
        group.append(number)
        tokens += len(sequence)
    if group:
        yield group


def share(sequences: Sequence[Sequence[int]], kinds: Sequence[object] = ()) -> SharedSequences:
    """Pack sequences.

    Args:
        sequences: each with a token at least.
        kinds: only sequences of one kind share anything; empty: all are.
    """
    alike: dict[object, list[int]] = defaultdict(list)
    for number, sequence in enumerate(sequences):
        alike[kinds[number] if kinds else None, tuple(sequence[:_LEAST_SHARED])].append(number)
    shared = {number: _common(sequences, numbers) for numbers in alike.values() for number in numbers[1:]}
    leaders = {number: numbers[0] for numbers in alike.values() for number in numbers}
    paths: list[Tensor] = []
    fronts, lengths, ids, positions = [], [], list[int](), list[int]()
    for number, sequence in enumerate(sequences):
        seen = shared.get(number, 0)
        front = paths[leaders[number]][:seen] if seen else torch.arange(0)
        paths.append(torch.cat([front, torch.arange(len(ids), len(ids) + len(sequence) - seen)]))
        fronts.append(front)
        lengths.append(len(sequence) - seen)
        ids += sequence[seen:]
        positions += range(seen, len(sequence))
    none = torch.zeros(0, dtype=torch.int64)
    packed = PackedSequence(
        torch.tensor(ids), torch.tensor(positions), 0, tuple(lengths), tuple(fronts), label_positions=none, targets=none
    )
    repeats = torch.bincount(torch.cat(paths), minlength=len(ids)).float()[:, None]
    return SharedSequences(packed, paths, repeats)


def _common(sequences: Sequence[Sequence[int]], numbers: Sequence[int]) -> int:
    """Return how many tokens some sequences begin with in common, so that each has one of its own; 0 for few."""
    most = min(len(sequences[number]) for number in numbers) - 1
    columns = zip(*(sequences[number][:most] for number in numbers), strict=True)
    length = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return length if length >= _LEAST_SHARED else 0
