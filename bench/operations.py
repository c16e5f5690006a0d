"""How many operations the exact result of training steps needs, and how fast the machine multiplies at their shapes.

Counted are, of every step, 4 for each weight outside the head and token, 4 for each head weight and labelled token,
6 for each adapter weight and token, and attention as it is computed exactly: 12 for each layer, query head, element of
a head, and pair of a token and one that it sees (two products forwards, four backwards, 2 each). A beginning that all
chats of a step share is counted once. Tokens behind a chat's last labelled place can't change the result: not counted.

That is the rule, and a little of what it counts is not needed either: in the last layer nobody reads what is not about
to predict a label (its keys and values apart), and the first layer's input needs no gradient. `Needed.spared` is that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kolotune.engines.prepared_tokens import PreparedTokens


@dataclass(frozen=True)
class Shape:
    """A model's sizes, and the adapters' rank and places."""

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
        """That of a model folder of the Llama family."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        queries = config["num_attention_heads"]
        return cls(
            config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], queries,
            config.get("num_key_value_heads") or queries, config.get("head_dim") or config["hidden_size"] // queries,
            config["vocab_size"], rank, tuple(targets),
        )  # fmt: skip

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """A layer's linear parts: (inputs, outputs)."""
        query, key = self.queries * self.head, self.keys * self.head
        return {
            "q_proj": (self.width, query), "k_proj": (self.width, key), "v_proj": (self.width, key),
            "o_proj": (query, self.width), "gate_proj": (self.width, self.hidden),
            "up_proj": (self.width, self.hidden), "down_proj": (self.hidden, self.width),
        }  # fmt: skip

    @property
    def products(self) -> list[tuple[int, int]]:
        """A layer's matrices (inputs, outputs), those of one input side by side."""
        query, key = self.queries * self.head, self.keys * self.head
        return [
            (self.width, query + 2 * key),
            (query, self.width),
            (self.width, 2 * self.hidden),
            (self.hidden, self.width),
        ]


@dataclass(frozen=True)
class Needed:
    """Operations of one step, by what they are for, and the rows that its products have."""

    weights: int
    head: int
    adapters: int
    attention: int
    spared: int
    rows: int
    labels: int

    @property
    def all(self) -> int:
        """By the rule."""
        return self.weights + self.head + self.adapters + self.attention


def chats_of(tokens: PreparedTokens, indices: Sequence[int]) -> list[tuple[list[int], list[bool]]]:
    """Of these chats, ids and whether each is labelled."""
    return [(ids.tolist(), (labels >= 0).tolist()) for ids, labels in map(tokens.chat, indices)]


def needed(shape: Shape, chats: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Needed:
    """The operations of one step.

    Args:
        shape: the model's.
        chats: of each, ids and whether each is labelled.
    """
    ends, labels, label_pairs = [], 0, 0
    for _, labelled in chats:
        places = [place for place in range(1, len(labelled)) if labelled[place]]
        ends.append(places[-1] if places else 0)  # the last labelled token itself is only predicted
        labels += len(places)
        label_pairs += sum(places)  # the token before place p sees p tokens
    shared = shared_beginning([ids[:end] for (ids, _), end in zip(chats, ends, strict=True)])
    rows = shared + sum(end - shared for end in ends)
    pairs = sum(end * (end + 1) // 2 for end in ends) - (len(chats) - 1) * (shared * (shared + 1) // 2)
    linear = sum(inputs * outputs for inputs, outputs in shape.linears.values())
    adapters = {name: shape.rank * sum(shape.linears[name]) for name in shape.targets}
    keys = {"k_proj", "v_proj"}
    unread = 4 * sum(inputs * outputs for name, (inputs, outputs) in shape.linears.items() if name not in keys)
    unread += 6 * sum(size for name, size in adapters.items() if name not in keys)
    first = 2 * sum(shape.linears[name][0] * shape.linears[name][1] for name in ("q_proj", "k_proj", "v_proj"))
    by_pair = 12 * shape.queries * shape.head
    return Needed(
        weights=4 * shape.layers * linear * rows,
        head=4 * shape.width * shape.vocabulary * labels,
        adapters=6 * shape.layers * sum(adapters.values()) * rows,
        attention=by_pair * shape.layers * pairs,
        spared=unread * (rows - labels) + by_pair * (pairs - label_pairs) + first * rows,
        rows=rows,
        labels=labels,
    )


def shared_beginning(chats: Sequence[Sequence[int]]) -> int:
    """Tokens that all of several chats begin with; 0 for a chat that is alone."""
    if len(chats) < 2:
        return 0
    length = 0
    for tokens in zip(*chats, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


class Probe:
    """The bare products of one training step at the model's own shapes, forwards and backwards, and nothing else.

    Every layer has matrices of its own, as in the model, so that none waits in the processor's cache. Each product is
    computed in two ways, PyTorch's own and oneDNN's with the weight packed beforehand; the faster way counts.

    Args:
        shape: the model's.
        rows, labels: rows of a step's products, and of its head's.
        dtype: what is computed in.
    """

    def __init__(self, shape: Shape, rows: int, labels: int, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(1)

        def matrix(height: int, width: int) -> Tensor:
            return torch.randn(height, width, generator=draw).to(dtype)

        sizes = shape.products * shape.layers
        self._jobs: list[tuple[Tensor, Tensor]] = []
        for (inputs, outputs), count in [*((size, rows) for size in sizes), ((shape.width, shape.vocabulary), labels)]:
            weight = matrix(outputs, inputs)
            self._jobs.append((matrix(count, inputs), weight))  # forwards: x Wᵀ
            self._jobs.append((matrix(count, outputs), weight.t().contiguous()))  # backwards: d W
        self.operations = sum(2 * len(x) * weight.numel() for x, weight in self._jobs)
        self._packed = [torch.ops.mkldnn._reorder_linear_weight(weight, len(x)) for x, weight in self._jobs]

    @torch.no_grad()
    def rate(self) -> float:
        """Operations a second, of the faster of the two ways."""
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
    """Operations a second of one large square product, for comparison."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(left, right)
    started = time.perf_counter()
    for _ in range(5):
        torch.mm(left, right)
    return 5 * 2 * size**3 / (time.perf_counter() - started)
