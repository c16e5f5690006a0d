"""Types are chosen by what the model loses, on the hull of size and divergence, and within the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kolotune.gguf import header
from kolotune.gguf.header import GgufSummary, GgufTensor
from kolotune.gguf.type_choices import Sensitivity, curve, file_type, knee, part_of, possible_types, smallest_size

pytestmark = pytest.mark.usefixtures("one_thread")
_SHAPES = {
    "token_embd.weight": (64, 96), "blk.0.attn_q.weight": (64, 64), "blk.0.ffn_down.weight": (256, 64),
    "blk.0.attn_norm.weight": (64,), "blk.0.odd.weight": (40, 8),
}  # fmt: skip


def summary() -> GgufSummary:
    tensors, offset = {}, 0
    for name, shape in _SHAPES.items():
        kind = "F32" if len(shape) == 1 else "F16"
        size = header.size_of(shape, kind)
        tensors[name] = GgufTensor(shape, kind, size, offset)
        offset += size
    fields: dict[str, object] = {"llama.block_count": 1, "llama.attention.head_count": 2}
    return GgufSummary("llama", tensors, fields)


def bits_of(kind: str) -> float:
    width, size = header.block_of(kind)
    return 8 * size / width


def measured(costs: dict[str, float], together: float = 0.0) -> Sensitivity:
    """Return a measurement in which a type costs by its error, a matrix by its importance; the rest is shared."""
    possible = possible_types(summary())
    options = [(name, kind) for name, kinds in possible.items() for kind in kinds]
    errors = np.array([costs.get(name, 1.0) * 4.0 ** -bits_of(kind) for name, kind in options])
    products = np.diag(errors) * (1 - together) + together * np.sqrt(np.outer(errors, errors))
    return Sensitivity(options, products, summary())


def test_the_possible_types_are_of_whole_blocks() -> None:
    possible = possible_types(summary())
    assert set(possible) == {"token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_down.weight"}
    assert "Q4_K" in possible["blk.0.ffn_down.weight"] and "Q4_K" not in possible["blk.0.attn_q.weight"]
    for name, kinds in possible.items():
        assert all(_SHAPES[name][0] % header.block_of(kind)[0] == 0 for kind in kinds)


def test_each_step_saves_bytes_and_costs_more_divergence() -> None:
    path = measured({"blk.0.attn_q.weight": 30.0}).path
    assert path[0].kl == 0 and set(path[0].types.values()) == {"F16"}
    assert all(before.size > after.size for before, after in itertools.pairwise(path))
    assert all(before.kl <= after.kl for before, after in itertools.pairwise(path))
    assert smallest_size(summary(), 0) == path[-1].size


def test_the_walk_is_as_good_as_trying_everything() -> None:
    sensitivity = measured({"blk.0.attn_q.weight": 30.0, "token_embd.weight": 0.1})
    possible = possible_types(summary())
    sizes = {name: summary().tensors[name] for name in possible}
    for mixture in sensitivity.path:
        assert sensitivity.predicted(mixture.types) == pytest.approx(mixture.kl, abs=1e-12)
    best = sensitivity.within_size(sensitivity.path[len(sensitivity.path) // 2].size)
    assert best is not None
    fixed = best.size - sum(header.size_of(sizes[name].shape, kind) for name, kind in best.types.items())
    choices = [[(name, kind) for kind in (*kinds, "F16")] for name, kinds in possible.items()]
    least = min(
        sensitivity.predicted(dict(each))
        for each in itertools.product(*choices)
        if fixed + sum(header.size_of(sizes[name].shape, kind) for name, kind in each) <= best.size
    )
    assert best.kl == pytest.approx(least)


def test_the_important_matrix_keeps_more_bits() -> None:
    sensitivity = measured({"blk.0.attn_q.weight": 1000.0, "token_embd.weight": 0.001})
    middle = sensitivity.path[len(sensitivity.path) // 2].types
    assert bits_of(middle["blk.0.attn_q.weight"]) > bits_of(middle["token_embd.weight"])


def test_errors_that_add_up_count_more() -> None:
    types = measured({}).path[-1].types
    assert measured({}, together=0.9).predicted(types) > 1.5 * measured({}).predicted(types)


def test_budgets_are_kept() -> None:
    sensitivity = measured({})
    sizes = [mixture.size for mixture in sensitivity.path]
    fitting = sensitivity.within_size(sizes[2] + 1)
    assert fitting is not None and fitting.size == sizes[2]
    filled = sensitivity.within_size(sizes[1] - 1)
    assert filled is not None and sizes[2] <= filled.size < sizes[1] and filled.kl <= sensitivity.path[2].kl
    assert sensitivity.within_size(sizes[-1] - 1) is None
    bound = sensitivity.path[3].kl
    assert sensitivity.within_kl(bound).kl <= bound < sensitivity.path[-1].kl


def test_the_knee_is_where_the_curve_bends() -> None:
    points = [(size, 1.0 / size**2) for size in range(1, 21)]
    assert points[knee(points)][0] in (3, 4)
    shown = curve(measured({}).path, header_size=100)
    assert shown == sorted(shown) and shown[-1][1] == 0
    assert [kl for _, kl in shown] == sorted((kl for _, kl in shown), reverse=True)


def test_the_file_type_is_that_of_most_weights() -> None:
    types = {"token_embd.weight": "Q8_0", "blk.0.attn_q.weight": "Q5_0", "blk.0.ffn_down.weight": "Q4_K"}
    assert file_type(types, summary()) == "Q4_K_M"
    assert file_type({**types, "blk.0.ffn_down.weight": "F16"}, summary()) == "Q8_0"


def test_parts_are_alike_in_all_layers() -> None:
    assert part_of("blk.12.ffn_up.weight") == "ffn_up" and part_of("output.weight") == "output"
