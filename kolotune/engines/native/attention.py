"""Causal attention over packed sequences, forward and backward.

Short chats are computed as a padded batch, by plain batched matrix products, with the shared prefix's keys in front of
each chat's; PyTorch's own CPU kernel takes several times as long for them. Long chats use that kernel, chat by chat,
because the memory of the products grows with the square of the length. So do chats with branches, segment by segment:
their lengths differ too much for a padded batch. That kernel can't cap scores; `capped_attention` can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import capped_attention, sequence_packing
from .attention_limits import Limits, cap_scores, hidden_keys
from .matrix_product import InputGradient
from .rotary import Rotary
from .sequence_packing import PackedSequence, Segment

_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_softmax_backward: Any = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, and their width. Query head h reads key head ``h // (queries // keys)``."""

    queries: int
    keys: int
    width: int

    @property
    def all(self) -> int:
        """Heads of queries, keys and values together."""
        return self.queries + 2 * self.keys


class Attention(Protocol):
    """Attention for one packed sequence."""

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        """Compute ``[tokens, queries * width]`` from queries, keys and values ``[tokens, heads.all * width]``.

        Args:
            qkv: head after head, before the rotary embedding; its memory may be overwritten.
            into: receives the result.

        Returns:
            What `backward` needs.
        """

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """Return the gradient of qkv, ``[tokens, heads.all * width]``, from the output and its gradient."""


def attention_for(packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits) -> Attention:
    """Return the implementation that suits the lengths of the chats."""
    if packed.has_branches or max(packed.lengths) > sequence_packing.LONG:
        return LongAttention(packed, heads, rotary, limits)
    return ShortAttention(packed, heads, rotary, limits)


def padded_layout(packed: PackedSequence) -> tuple[Tensor, Tensor, int]:
    """Return the layout of a padded batch of the chats, whose first row is the shared prefix.

    Returns:
        int64 ``[rows]``: lengths; int64 ``[rows * width]``: the token at each position, -1 in the padding; the width.
    """
    lengths = torch.tensor([*([packed.prefix] if packed.prefix else []), *packed.lengths])
    width = int(lengths.max())
    within = torch.arange(width)
    starts = lengths.cumsum(0) - lengths
    return lengths, torch.where(within < lengths[:, None], starts[:, None] + within, -1).flatten(), width


class ShortAttention:
    """Attention as a padded batch: a row for each chat, and one more for a shared prefix."""

    def __init__(self, packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits) -> None:
        self.heads, self.prefix, self.rotary, self.cap = heads, packed.prefix, rotary, limits.cap
        lengths, source, self.width = padded_layout(packed)
        self.rows = len(lengths)
        self.grid = source.clamp(min=0)  # the padding may hold anything
        self.unpadded = (source >= 0).nonzero().squeeze(1)
        hidden = hidden_keys(self.width, packed.prefix, limits.window)
        hidden = hidden.repeat(self.rows if packed.prefix else 1, 1, 1)
        if packed.prefix:  # the prefix's row has its keys behind, like every other row
            hidden[0] = torch.ones(self.width, packed.prefix + self.width, dtype=torch.bool)
            hidden[0, :, packed.prefix :] = hidden_keys(self.width, 0, limits.window)
        mask = torch.zeros(hidden.shape, dtype=rotary.dtype).masked_fill_(hidden, torch.finfo(rotary.dtype).min)
        self.mask = mask[:, None, None]

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        heads, rows, width = self.heads, self.rows, self.width
        grid = (
            apply_rotary(qkv, heads, self.rotary).index_select(0, self.grid).view(rows, width, heads.all, heads.width)
        )
        queries = self._by_head(grid[:, :, : heads.queries])
        keys = self._with_prefix(grid[:, :, heads.queries : heads.queries + heads.keys])
        values = self._with_prefix(grid[:, :, heads.queries + heads.keys :])
        scores = torch.bmm(queries, keys.transpose(1, 2))
        slopes = cap_scores(scores, self.cap)
        shaped = scores.view(rows, heads.keys, -1, width, self.prefix + width)
        shaped += self.mask
        shares = torch.softmax(scores, -1)
        out = torch.bmm(shares, values).view(rows, heads.keys, -1, width, heads.width)
        out = out.permute(0, 3, 1, 2, 4).reshape(rows * width, -1)
        into.copy_(out.index_select(0, self.unpadded))
        return queries, keys, values, shares, *slopes

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        del out
        queries, keys, values, shares, *slopes = kept
        heads, rows, width = self.heads, self.rows, self.width
        d_mixed = d_out.sum()
        grid = d_mixed.new_zeros(rows * width, heads.queries * heads.width).index_copy_(0, self.unpadded, d_mixed)
        d_result = self._by_head(grid.view(rows, width, heads.queries, heads.width))
        d_shares = torch.bmm(d_result, values.transpose(1, 2))
        d_scores = _softmax_backward(d_shares, shares, -1, shares.dtype)
        for slope in slopes:
            d_scores *= slope
        gradient = d_mixed.new_empty(rows, width, heads.all, heads.width)
        d_queries = torch.bmm(d_scores, keys).view(rows, heads.keys, -1, width, heads.width)
        torch.unflatten(gradient[:, :, : heads.queries], 2, (heads.keys, -1)).copy_(d_queries.permute(0, 3, 1, 2, 4))
        d_keys = self._without_prefix(torch.bmm(d_scores.transpose(1, 2), queries))
        d_values = self._without_prefix(torch.bmm(shares.transpose(1, 2), d_result))
        gradient[:, :, heads.queries : heads.queries + heads.keys] = d_keys
        gradient[:, :, heads.queries + heads.keys :] = d_values
        packed = gradient.view(rows * width, heads.all, heads.width).index_select(0, self.unpadded)
        return rotary_backward(packed, heads, self.rotary)

    def _by_head(self, grid: Tensor) -> Tensor:
        """``[rows, width, queries, d]`` to ``[rows * keys, queries / keys * width, d]``."""
        grouped = torch.unflatten(grid, 2, (self.heads.keys, -1)).permute(0, 2, 3, 1, 4)
        return grouped.reshape(self.rows * self.heads.keys, -1, self.heads.width)

    def _with_prefix(self, grid: Tensor) -> Tensor:
        """``[rows, width, keys, d]`` to ``[rows * keys, prefix + width, d]``."""
        own = grid.permute(0, 2, 1, 3)
        if self.prefix:
            own = torch.cat([own[:1, :, : self.prefix].expand(self.rows, -1, -1, -1), own], 2)
        return own.reshape(self.rows * self.heads.keys, -1, self.heads.width)

    def _without_prefix(self, gradient: Tensor) -> Tensor:
        """Invert `_with_prefix`; the gradients of the prefix's keys from all rows are added to its own row."""
        split = gradient.view(self.rows, self.heads.keys, -1, self.heads.width)
        own = split[:, :, self.prefix :]
        if self.prefix:
            own[0, :, : self.prefix] += split[1:, :, : self.prefix].sum(0)
        return own.transpose(1, 2)


class LongAttention:
    """PyTorch's flash attention for CPUs, segment by segment: memory grows with the length, not with its square."""

    def __init__(self, packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits) -> None:
        self.heads, self.rotary, self.limits = heads, rotary, limits
        self.segments = sorted(packed.segments, key=lambda segment: segment.start)  # each behind all that it sees
        self.sums_in_fp32 = packed.has_branches

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        kept = [apply_rotary(qkv, self.heads, self.rotary)]
        for segment in self.segments:
            out, sums = self._attend(segment, *self._split(kept[0], segment))
            result = into[segment.start : segment.end]
            torch.unflatten(result, 1, (self.heads.queries, -1)).copy_(out[0].transpose(0, 1))
            kept.append(sums)
        return tuple(kept)

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        qkv, d_mixed, heads = kept[0], d_out.sum(), self.heads
        dtype = torch.float32 if self.sums_in_fp32 else qkv.dtype
        gradient = torch.empty(len(qkv), heads.all, heads.width, dtype=dtype)
        for segment, sums in zip(self.segments, kept[1:], strict=True):
            own = slice(segment.start, segment.end)
            d_shaped, out_shaped = (
                flat[own].reshape(1, segment.length, heads.queries, -1).transpose(1, 2) for flat in (d_mixed, out)
            )
            d_qkv = self._attend_backward(segment, d_shaped, *self._split(qkv, segment), out_shaped, sums)
            d_keys, d_values = (
                torch.unflatten(d_heads, 1, (heads.keys, -1)).sum(2)[0].transpose(0, 1) for d_heads in d_qkv[1:]
            )
            seen = len(segment.front)
            gradient[own] = torch.cat([d_qkv[0][0].transpose(0, 1), d_keys[seen:], d_values[seen:]], 1)
            if seen:
                d_front = torch.cat([d_keys[:seen], d_values[:seen]], 1)
                gradient[:, heads.queries :].index_add_(0, segment.front, d_front.to(dtype))
        return rotary_backward(gradient.to(qkv.dtype), heads, self.rotary)

    def _attend(self, segment: Segment, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.limits.cap:
            return capped_attention.forward(queries, keys, values, self.limits)
        result: tuple[Tensor, Tensor] = _flash(queries, keys, values, 0.0, **self._masking(segment))
        return result

    def _attend_backward(self, segment: Segment, d_out: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries, keys and values; `kept`: these three, the result and `_attend`'s sums."""
        if self.limits.cap:
            queries, keys, values, out, sums = kept
            return capped_attention.backward(d_out, queries, keys, values, out, sums, self.limits)
        result: tuple[Tensor, Tensor, Tensor] = _flash_backward(d_out, *kept, 0.0, **self._masking(segment))
        return result

    def _masking(self, segment: Segment) -> dict[str, Any]:
        """Return the options that let each of the segment's tokens see its window in front of it and none behind."""
        seen, window = len(segment.front), self.limits.window
        if not seen and (window is None or window >= segment.length):
            return {"is_causal": True, "scale": 1.0}
        hidden = hidden_keys(segment.length, seen, window)
        mask = torch.zeros(hidden.shape, dtype=self.rotary.dtype).masked_fill_(hidden, float("-inf"))
        return {"is_causal": False, "attn_mask": mask, "scale": 1.0}

    def _split(self, qkv: Tensor, segment: Segment) -> tuple[Tensor, Tensor, Tensor]:
        """Return a segment's queries ``[1, queries, length, d]``, and the keys and values that it sees."""
        heads = self.heads
        by_head = qkv.view(len(qkv), heads.all, heads.width)
        own = by_head[segment.start : segment.end]
        seen = own[:, heads.queries :]
        if len(segment.front):
            seen = torch.cat([by_head[segment.front, heads.queries :], seen])
        queries, (keys, values) = own[:, : heads.queries], torch.split(seen, heads.keys, 1)
        repeats = heads.queries // heads.keys
        return (
            queries.transpose(0, 1)[None],
            keys.transpose(0, 1)[None].repeat_interleave(repeats, 1),
            values.transpose(0, 1)[None].repeat_interleave(repeats, 1),
        )


def apply_rotary(qkv: Tensor, heads: Heads, rotary: Rotary) -> Tensor:
    """Apply the rotary embedding to queries and keys of ``[tokens, heads.all * width]``."""
    shaped = qkv.view(len(qkv), heads.all, heads.width)
    both = heads.queries + heads.keys
    result = torch.empty_like(shaped)
    result[:, both:] = shaped[:, both:]
    rotary.rotate(shaped[:, :both], result[:, :both])
    return result.view(len(qkv), -1)


def rotary_backward(gradient: Tensor, heads: Heads, rotary: Rotary) -> Tensor:
    """Return the gradient of the input of `apply_rotary`, ``[tokens, heads.all * width]``."""
    both = heads.queries + heads.keys
    result = torch.empty_like(gradient)
    result[:, both:] = gradient[:, both:]
    rotary.rotate_back(gradient[:, :both], result[:, :both])
    return result.view(len(gradient), -1)
