"""Attention over segments end to end: which kernel computes it, and what is asked of PyTorch's flash attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.packed_models import chats_of, compare, pair_of
from support.training import branching_chats
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from kolotune.engines.native import varlen_attention
from kolotune.engines.native.attention_limits import Limits
from kolotune.engines.native.device_operations import DeviceOperations
from kolotune.engines.native.varlen_attention import FlashKernel, PlainKernel, kernel_for

MakeTraining = Callable[..., Any]


def _shares(
    queries: Tensor, keys: Tensor, starts: tuple[Tensor, Tensor], scale: float, left: int, right: int
) -> Tensor:
    """Return which share each key has for a query, ``[heads, queries, keys]``, by the documentation's words."""
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool)
    for (q, q_end), (k, k_end) in zip(*(each.unfold(0, 2, 1).tolist() for each in starts), strict=True):
        behind = torch.arange(k_end - k) - torch.arange(q_end - q)[:, None] - (k_end - k - q_end + q)
        hidden[q:q_end, k:k_end] = (behind > right) | ((behind < -left) if left >= 0 else False)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


@pytest.fixture
def flash_on_cpu() -> Iterator[None]:
    """Give PyTorch's flash attention, which has no CPU kernel, one that is written from its documentation."""

    def forward(
        queries: Tensor, keys: Tensor, values: Tensor, query_starts: Tensor, key_starts: Tensor, most_queries: int,
        most_keys: int, dropout: float, is_causal: bool, debug: bool, *, scale: float, window_size_left: int,
        window_size_right: int, **_: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        starts = query_starts, key_starts
        assert all(each.dtype == torch.int32 for each in starts)
        assert (most_queries, most_keys) == tuple(int(each.diff().max()) for each in starts)
        assert is_causal == (window_size_left == -1) and not dropout and not debug
        repeats = queries.shape[1] // keys.shape[1]
        keys, values = (each.repeat_interleave(repeats, 1) for each in (keys, values))
        shares = _shares(queries, keys, starts, scale, window_size_left, window_size_right)
        out = torch.einsum("hqk,khd->qhd", shares, values)
        sums, empty = torch.zeros(queries.shape[1], len(queries)), torch.empty(0)
        return out, sums, empty, empty, empty

    def backward(
        d_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, sums: Tensor, query_starts: Tensor,
        key_starts: Tensor, most_queries: int, most_keys: int, dropout: float, is_causal: bool, random: Tensor,
        unused: Tensor, *, scale: float, window_size_left: int, window_size_right: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        groups = keys.shape[1]
        keys, values = (each.repeat_interleave(queries.shape[1] // groups, 1) for each in (keys, values))
        shares = _shares(queries, keys, (query_starts, key_starts), scale, window_size_left, window_size_right)
        d_shares = torch.einsum("qhd,khd->hqk", d_out, values)
        d_scores = shares * (d_shares - (d_shares * shares).sum(-1, keepdim=True)) * scale
        d_keys = torch.einsum("hqk,qhd->khd", d_scores, queries)
        d_values = torch.einsum("hqk,qhd->khd", shares, d_out)
        d_keys, d_values = (torch.unflatten(each, 1, (groups, -1)).sum(2) for each in (d_keys, d_values))
        return torch.einsum("hqk,khd->qhd", d_scores, keys), d_keys, d_values

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("mistral", {"sliding_window": 9})])
def test_flash_attention_is_asked_for_what_transformers_computes(
    kind: str, more: dict[str, Any], make_training: MakeTraining, flash_on_cpu: None
) -> None:
    chats = [*branching_chats(2, 5, system=12, longest=20), *chats_of(2, 3, 12, 60)]
    job = make_training(kind, chats=chats, **more).job()
    models = pair_of(job, DeviceOperations(lambda *_: FlashKernel()))
    compare(job, *models)
    compare(job, *models, share=False)


@pytest.mark.parametrize(
    ("dtype", "width", "cap", "expected"),
    [
        (torch.bfloat16, 64, 0.0, FlashKernel),
        (torch.float16, 256, 0.0, FlashKernel),
        (torch.float32, 64, 0.0, PlainKernel),
        (torch.bfloat16, 64, 50.0, PlainKernel),
        (torch.bfloat16, 20, 0.0, PlainKernel),
        (torch.bfloat16, 208, 0.0, PlainKernel),
        (torch.bfloat16, 512, 0.0, PlainKernel),
    ],
)
def test_the_kernel_that_can_compute_it(
    dtype: torch.dtype, width: int, cap: float, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr(varlen_attention, "_has_flash", lambda _: True)
    assert isinstance(kernel_for(device, dtype, width, Limits(cap=cap)), expected)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_have_no_flash_attention(device: str) -> None:
    assert isinstance(kernel_for(torch.device(device), torch.bfloat16, 64, Limits()), PlainKernel)


def test_what_pytorch_has_on_the_cpu() -> None:
    """Its attention over segments has no kernel there; experts' products and the loss without logits have one."""
    heads, starts = torch.randn(6, 2, 16, dtype=torch.bfloat16), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="CPU"):
        varlen_attn(heads, heads, heads, starts, starts, 6, 6)
    rows, experts = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(2, 16, 24, dtype=torch.bfloat16)
    products = functional.grouped_mm(rows, experts, offs=torch.tensor([2, 6], dtype=torch.int32))
    torch.testing.assert_close(products, torch.cat([rows[:2] @ experts[0], rows[2:] @ experts[1]]))
    hidden, head, ids = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    loss = functional.linear_cross_entropy(hidden, head, ids)
    torch.testing.assert_close(loss, functional.cross_entropy(hidden @ head.T, ids))
