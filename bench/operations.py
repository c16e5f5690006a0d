"""How many operations the exact result of a training step needs, and how fast the machine multiplies at its shapes.

A step counts 4 operations per token and weight outside the head, 4 per labelled token and weight of the head, 6 per
token and adapter weight, and exact attention: 12 per layer, query head, element of a head, and pair of a token and one
that it sees (two products forward, four backward, 2 each). A prefix that all chats of a step share counts once. Tokens
after a chat's last label don't count, because they can't change the result.

A little of that is not needed either: in the last layer, positions that predict no label need only keys and values, and
the first layer's input needs no gradient. `Operations.unneeded` counts these.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from kolotune.engines.prepared_tokens import PreparedTokens


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and its adapters."""

    width: int
    hidden: int
    layers: int
    queries: int
    keys: int
    head: int
    vocabulary: int
    rank: int
    targets: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, rank: int, targets: Sequence[str]) -> Shape:
        """Read the shape of a model folder of the Llama family."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        queries = config["num_attention_heads"]
        return cls(
            config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], queries,
            config.get("num_key_value_heads") or queries, config.get("head_dim") or config["hidden_size"] // queries,
            config["vocab_size"], rank, tuple(targets),
        )  # fmt: skip

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a decoder layer, as (inputs, outputs)."""
        query, key = self.queries * self.head, self.keys * self.head
        return {
            "q_proj": (self.width, query), "k_proj": (self.width, key), "v_proj": (self.width, key),
            "o_proj": (query, self.width), "gate_proj": (self.width, self.hidden),
            "up_proj": (self.width, self.hidden), "down_proj": (self.hidden, self.width),
        }  # fmt: skip

    @property
    def products(self) -> list[tuple[int, int]]:
        """The matrices of a decoder layer, as (inputs, outputs); those with the same input are joined."""
        query, key = self.queries * self.head, self.keys * self.head
        return [
            (self.width, query + 2 * key),
            (query, self.width),
            (self.width, 2 * self.hidden),
            (self.hidden, self.width),
        ]


@dataclass(frozen=True)
class Operations:
    """Operations of one step by purpose, and the rows of its matrix products."""

    weights: int
    head: int
    adapters: int
    attention: int
    unneeded: int
    rows: int
    labels: int

    @property
    def all(self) -> int:
        """All counted operations."""
        return self.weights + self.head + self.adapters + self.attention


def chats_of(tokens: PreparedTokens, indices: Sequence[int]) -> list[tuple[list[int], list[bool]]]:
    """Return the chats' token ids, and whether each token is labelled."""
    return [(ids.tolist(), (labels >= 0).tolist()) for ids, labels in map(tokens.sequence, indices)]


def count_operations(shape: Shape, chats: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Operations:
    """Count the operations of one step.

    Args:
        shape: of the model.
        chats: token ids, and whether each token is labelled.
    """
    ends, labels, label_pairs = [], 0, 0
    for _, labelled in chats:
        positions = [position for position in range(1, len(labelled)) if labelled[position]]
        ends.append(positions[-1] if positions else 0)  # the last labelled token itself is only predicted
        labels += len(positions)
        label_pairs += sum(positions)  # the token before position p sees p tokens
    shared = shared_prefix([ids[:end] for (ids, _), end in zip(chats, ends, strict=True)])
    rows = shared + sum(end - shared for end in ends)
    pairs = sum(end * (end + 1) // 2 for end in ends) - (len(chats) - 1) * (shared * (shared + 1) // 2)
    linear = sum(inputs * outputs for inputs, outputs in shape.linears.values())
    adapters = {name: shape.rank * sum(shape.linears[name]) for name in shape.targets}
    keys = {"k_proj", "v_proj"}
    unread = 4 * sum(inputs * outputs for name, (inputs, outputs) in shape.linears.items() if name not in keys)
    unread += 6 * sum(size for name, size in adapters.items() if name not in keys)
    first = 2 * sum(shape.linears[name][0] * shape.linears[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    by_pair = 12 * shape.queries * shape.head
    return Operations(
        weights=4 * shape.layers * linear * rows,
        head=4 * shape.width * shape.vocabulary * labels,
        adapters=6 * shape.layers * sum(adapters.values()) * rows,
        attention=by_pair * shape.layers * pairs,
        unneeded=unread * (rows - labels) + by_pair * (pairs - label_pairs) + first * rows,
        rows=rows,
        labels=labels,
    )


def shared_prefix(chats: Sequence[Sequence[int]]) -> int:
    """Return the length of the prefix that several chats share; 0 for a single chat."""
    if len(chats) < 2:
        return 0
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*chats, strict=False)))


class MatrixProbe:
    """Only the matrix products of a training step, forward and backward, at the model's own shapes.

    Every layer has separate matrices, as in the model, so that none stays in the processor's cache. Each product is
    computed in two ways, by PyTorch and by oneDNN with packed weights; the faster way counts.

    Args:
        shape: of the model.
        rows, labels: rows of a step's products, and of those of the head.
        dtype: of the matrices.
    """

    def __init__(self, shape: Shape, rows: int, labels: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)

        def matrix(height: int, width: int) -> Tensor:
            return torch.randn(height, width, generator=generator).to(dtype)

        sizes = shape.products * shape.layers
        self._jobs: list[tuple[Tensor, Tensor]] = []
        for (inputs, outputs), count in [*((size, rows) for size in sizes), ((shape.width, shape.vocabulary), labels)]:
            weight = matrix(outputs, inputs)
            self._jobs.append((matrix(count, inputs), weight))  # forward: x Wᵀ
            self._jobs.append((matrix(count, outputs), weight.t().contiguous()))  # backward: d W
        self.operations = sum(2 * len(x) * weight.numel() for x, weight in self._jobs)
        self._packed = [torch.ops.mkldnn._reorder_linear_weight(weight, len(x)) for x, weight in self._jobs]

    @torch.no_grad()
    def rate(self) -> float:
        """Return the operations per second of the faster way."""
        started = time.perf_counter()
        for x, weight in self._jobs:
            torch.nn.functional.linear(x, weight)
        plain = time.perf_counter() - started
        started = time.perf_counter()
        for (x, _), packed in zip(self._jobs, self._packed, strict=True):
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return self.operations / min(plain, time.perf_counter() - started)


@torch.no_grad()
def square_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Return the operations per second of one large square product, for comparison."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(left, right)
    started = time.perf_counter()
    for _ in range(5):
        torch.mm(left, right)
    return 5 * 2 * size**3 / (time.perf_counter() - started)
