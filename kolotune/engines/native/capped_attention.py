"""Causal attention with capped scores over one segment, some queries at a time, in PyTorch.

It has the shapes of PyTorch's flash attention for CPUs, which can't cap scores, and runs on any device. Memory grows
with the length, not with its square: the backward pass computes the scores again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_limits import Limits, cap_scores, hidden_keys

_QUERIES_AT_ONCE = 128


def forward(queries: Tensor, keys: Tensor, values: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Compute attention.

    Args:
        queries: ``[1, heads, length, width]``, of the last tokens.
        keys, values: ``[1, heads, tokens, width]``.
        limits: of the scores.

    Returns:
        The result, like `queries`, and fp32 ``[1, heads, length]``: logarithms of the sums of exponentials.
    """
    out, sums = torch.empty_like(queries), queries.new_empty(queries.shape[:-1], dtype=torch.float32)
    for rows, seen in _blocks(queries, keys, limits):
        scores, _ = _scores(queries, keys, rows, seen, limits)
        sums[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = scores.softmax(-1).to(values.dtype) @ values[:, :, seen]
    return out, sums


def backward(
    d_out: Tensor, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, sums: Tensor, limits: Limits
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, from those of the result; shapes as in `forward`."""
    d_queries, d_keys, d_values = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, seen in _blocks(queries, keys, limits):
        scores, slopes = _scores(queries, keys, rows, seen, limits)
        shares, d_block = (scores - sums[:, :, rows, None]).exp_(), d_out[:, :, rows]
        d_shares = (d_block @ values[:, :, seen].transpose(2, 3)).float()
        d_scores = shares * (d_shares - (d_block.float() * out[:, :, rows].float()).sum(-1, keepdim=True))
        for slope in slopes:
            d_scores *= slope
        d_scores = d_scores.to(keys.dtype)
        d_queries[:, :, rows] = d_scores @ keys[:, :, seen]
        d_keys[:, :, seen] += d_scores.transpose(2, 3) @ queries[:, :, rows]
        d_values[:, :, seen] += shares.to(values.dtype).transpose(2, 3) @ d_block
    return d_queries, d_keys, d_values


def _blocks(queries: Tensor, keys: Tensor, limits: Limits) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, and the keys that they see."""
    length, front = queries.shape[2], keys.shape[2] - queries.shape[2]
    for start in range(0, length, _QUERIES_AT_ONCE):
        end = min(start + _QUERIES_AT_ONCE, length)
        first = 0 if limits.window is None else max(0, front + start + 1 - limits.window)
        yield slice(start, end), slice(first, front + end)


def _scores(
    queries: Tensor, keys: Tensor, rows: slice, seen: slice, limits: Limits
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a block's scores, fp32 ``[1, heads, rows, seen]``, and by what their gradients are multiplied."""
    scores = (queries[:, :, rows] @ keys[:, :, seen].transpose(2, 3)).float()
    slopes = cap_scores(scores, limits.cap)
    count = rows.stop - rows.start
    hidden = hidden_keys(count, seen.stop - seen.start - count, limits.window, scores.device)
    return scores.masked_fill_(hidden, float("-inf")), slopes
