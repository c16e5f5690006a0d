"""The parts of a decoder's step on a GPU, by PyTorch's own kernels.

The host only enqueues work: nothing of a step is read back, and what is computed never depends on a tensor's values.
So the GPU does not wait for Python between the layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import Attention, Heads, apply_rotary, rotary_backward
from .attention_limits import Limits
from .expert_products import ExpertProducts, products_for
from .matrix_product import InputGradient
from .operations import PlainOperations
from .rotary import Rotary
from .sequence_packing import PackedSequence
from .transfers import to_device
from .varlen_attention import Lengths, VarlenKernel, kernel_for


class DeviceOperations(PlainOperations):
    """`Operations` on a device.

    Args:
        kernel_for: chooses the attention's kernel for a device, a dtype, the width of heads and limits.
    """

    def __init__(
        self, kernel_for: Callable[[torch.device, torch.dtype, int, Limits], VarlenKernel] = kernel_for
    ) -> None:
        self._kernel_for = kernel_for

    def expert_products(self, router: Tensor) -> ExpertProducts:
        return products_for(router.device, router.dtype)

    def attention(self, packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits) -> Attention:
        kernel = self._kernel_for(packed.positions.device, rotary.dtype, heads.width, limits)
        return DeviceAttention(packed, heads, rotary, limits, kernel)


class DeviceAttention:
    """Attention with all segments at once; each has the keys that it shares with others in front of its own."""

    def __init__(
        self, packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits, kernel: VarlenKernel
    ) -> None:
        self.heads, self.rotary, self.limits, self.kernel = heads, rotary, limits, kernel
        segments = sorted(packed.segments, key=lambda segment: segment.start)
        queries = tuple(segment.length for segment in segments)
        keys = tuple(len(segment.front) + segment.length for segment in segments)
        device = packed.positions.device
        self.lengths = Lengths(queries, keys, to_device(_starts(queries), device), to_device(_starts(keys), device))
        self.seen: Tensor | None = None  # int64 [keys]: the token of each key, where some are seen by several segments
        if keys != queries:
            seen = [torch.cat([segment.front, torch.arange(segment.start, segment.end)]) for segment in segments]
            self.seen = to_device(torch.cat(seen), device)

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        turned = apply_rotary(qkv, self.heads, self.rotary)
        out, sums = self.kernel.forward(*self._split(turned), self.lengths, self.limits)
        into.copy_(out.flatten(1))
        return turned, sums

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        (turned, sums), heads = kept, self.heads
        d_shaped, out_shaped = (torch.unflatten(flat, 1, (heads.queries, heads.width)) for flat in (d_out.sum(), out))
        d_queries, d_keys, d_values = self.kernel.backward(
            d_shaped, (*self._split(turned), out_shaped, sums), self.lengths, self.limits
        )
        gradient = turned.new_empty(len(turned), heads.all, heads.width)
        gradient[:, : heads.queries] = d_queries
        d_seen = torch.cat([d_keys, d_values], 1)
        if self.seen is not None:
            whole = d_seen.new_zeros(len(turned), *d_seen.shape[1:], dtype=torch.float32)
            d_seen = whole.index_add_(0, self.seen, d_seen.float())
        gradient[:, heads.queries :] = d_seen
        return rotary_backward(gradient, heads, self.rotary)

    def _split(self, turned: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, and the keys and values that each segment sees, ``[…, heads, width]``."""
        heads = self.heads
        by_head = turned.view(len(turned), heads.all, heads.width)
        seen = by_head[:, heads.queries :]
        if self.seen is not None:
            seen = seen.index_select(0, self.seen)
        return by_head[:, : heads.queries], seen[:, : heads.keys], seen[:, heads.keys :]


def _starts(lengths: tuple[int, ...]) -> Tensor:
    """Return int32 ``[segments + 1]``: where each begins, and the end."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
