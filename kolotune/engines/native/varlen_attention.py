"""Causal attention over segments of different lengths that lie end to end, forward and backward, on any device.

Each segment's last key belongs to its last query. `FlashKernel` is what `torch.nn.attention.varlen` calls on NVIDIA's
GPUs. `PlainKernel` computes what that can't: fp32, capped scores, odd widths, and other devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import capped_attention
from .attention_limits import Limits

_flash: Any = torch.ops.aten._flash_attention_forward
_flash_backward: Any = torch.ops.aten._flash_attention_backward

_WIDEST_HEAD = 256
_SLOW_WIDTHS = range(193, 225)  # of which the backward pass needs more shared memory than most GPUs have
_FIRST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Lengths:
    """How many queries and keys each segment has.

    Attributes:
        queries, keys: of each segment, on the host.
        query_starts, key_starts: int32 ``[segments + 1]``, on the device: sums of those before.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    query_starts: Tensor
    key_starts: Tensor


class VarlenKernel(Protocol):
    """Attention of ``queries [tokens, heads, width]`` to ``keys, values [keys, key_heads, width]``, unscaled."""

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, limits: Limits
    ) -> tuple[Tensor, Tensor]:
        """Return the result, like `queries`, and the fp32 logarithms of the sums of exponentials."""

    def backward(
        self, d_out: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lengths: Lengths, limits: Limits
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries, keys and values; `kept`: these three, the result and the logarithms."""


class FlashKernel:
    """PyTorch's own kernels (Dao, "FlashAttention-2", 2023), all segments at once, in bf16 or fp16.

    `varlen_attn` hides its backward pass in autograd, so this calls the operations under it, in the same way.
    """

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, limits: Limits
    ) -> tuple[Tensor, Tensor]:
        result = _flash(queries, keys, values, *_spans(lengths), 0.0, limits.window is None, False, **_options(limits))
        return result[0], result[1]

    def backward(
        self, d_out: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lengths: Lengths, limits: Limits
    ) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.zeros(2, dtype=torch.uint64, device=d_out.device)  # of dropout, which there is not
        unused = torch.empty(0, device=d_out.device)
        result: tuple[Tensor, Tensor, Tensor] = _flash_backward(
            d_out, *kept, *_spans(lengths), 0.0, limits.window is None, random, unused, **_options(limits)
        )
        return result


def _spans(lengths: Lengths) -> tuple[Tensor, Tensor, int, int]:
    return lengths.query_starts, lengths.key_starts, max(lengths.queries), max(lengths.keys)


def _options(limits: Limits) -> dict[str, Any]:
    """Return the scale, and how many tokens before and behind its own a query sees; -1 for all."""
    left = -1 if limits.window is None else limits.window - 1
    return {"scale": 1.0, "window_size_left": left, "window_size_right": 0}


class PlainKernel:
    """PyTorch's elementary operations, segment by segment and some queries at a time."""

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, lengths: Lengths, limits: Limits
    ) -> tuple[Tensor, Tensor]:
        out, sums = torch.empty_like(queries), []
        for own, seen in _segments(lengths):
            parts = _by_head(queries[own]), _repeated(keys[seen], queries), _repeated(values[seen], queries)
            result, sum_ = capped_attention.forward(*parts, limits)
            out[own] = result[0].transpose(0, 1)
            sums.append(sum_[0])
        return out, torch.cat(sums, 1)

    def backward(
        self, d_out: Tensor, kept: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], lengths: Lengths, limits: Limits
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, out, sums = kept
        gradients = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
        for own, seen in _segments(lengths):
            parts = capped_attention.backward(
                _by_head(d_out[own]),
                _by_head(queries[own]),
                _repeated(keys[seen], queries),
                _repeated(values[seen], queries),
                _by_head(out[own]),
                sums[None, :, own],
                limits,
            )
            for gradient, rows, part in zip(gradients, (own, seen, seen), parts, strict=True):
                heads = gradient.shape[1]
                gradient[rows] = torch.unflatten(part[0], 0, (heads, -1)).sum(1).transpose(0, 1)
        return gradients


def _segments(lengths: Lengths) -> list[tuple[slice, slice]]:
    """Return each segment's queries and keys."""
    slices, query, key = [], 0, 0
    for queries, keys in zip(lengths.queries, lengths.keys, strict=True):
        slices.append((slice(query, query + queries), slice(key, key + keys)))
        query, key = query + queries, key + keys
    return slices


def _by_head(x: Tensor) -> Tensor:
    """``[tokens, heads, width]`` to ``[1, heads, tokens, width]``."""
    return x.transpose(0, 1)[None]


def _repeated(x: Tensor, queries: Tensor) -> Tensor:
    """Like `_by_head`, with each key head repeated for the query heads that read it."""
    return _by_head(x).repeat_interleave(queries.shape[1] // x.shape[1], 1)


def kernel_for(device: torch.device, dtype: torch.dtype, width: int, limits: Limits) -> VarlenKernel:
    """Return the kernel that computes heads of `width` numbers in `dtype` on a device."""
    fits = dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= _WIDEST_HEAD
    if not fits or width in _SLOW_WIDTHS or limits.cap or not _has_flash(device):
        return PlainKernel()
    return FlashKernel()


def _has_flash(device: torch.device) -> bool:
    """Whether PyTorch's kernels run on a device; AMD's GPUs have others, of which not all know windows."""
    if device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
