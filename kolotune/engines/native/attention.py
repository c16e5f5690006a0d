"""Causal attention over packed chats, forwards and backwards.

Short chats: plain batched matrix products, each chat a row of a padded batch, with the shared beginning's keys in
front; for them PyTorch's own CPU kernel takes several times as long. Long chats: that kernel, chat by chat, because
the products' memory grows with the square of the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import packing
from .packing import Packed
from .products import InputGradient
from .rotary import Rotary

_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_softmax_backward: Any = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Heads:
    """Numbers of heads, and the width of one. Query head h reads key head ``h // (queries // keys)``."""

    queries: int
    keys: int
    width: int

    @property
    def all(self) -> int:
        """Heads in a row of queries, keys and values."""
        return self.queries + 2 * self.keys


class Attention(Protocol):
    """Attention for one packed row."""

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        """From queries, keys and values ``[row, heads.all * width]``, not yet turned, to ``[row, queries * width]``.

        Args:
            qkv: by head, one after the other; its memory may be used.
            into: takes the result.

        Returns:
            What `backward` needs.
        """

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """The gradient of qkv, ``[row, heads.all * width]``, from the output and its gradient."""


def attention_for(packed: Packed, heads: Heads, rotary: Rotary) -> Attention:
    """The way of computing that suits the chats' lengths."""
    if max(packed.lengths) > packing.LONG:
        return LongAttention(packed.lengths, heads, rotary)
    return ShortAttention(packed, heads, rotary)


def padded_places(packed: Packed) -> tuple[Tensor, Tensor, int]:
    """The padded batch of a row's chats, the shared beginning being its first row.

    Returns:
        int64 ``[rows]``: their lengths; int64 ``[rows * width]``: which token stands at each place, -1 in the padding;
        and the width.
    """
    lengths = torch.tensor([*([packed.prefix] if packed.prefix else []), *packed.lengths])
    width = int(lengths.max())
    within = torch.arange(width)
    starts = lengths.cumsum(0) - lengths
    return lengths, torch.where(within < lengths[:, None], starts[:, None] + within, -1).flatten(), width


class ShortAttention:
    """Each chat is a row of a padded batch; a shared beginning is one more row."""

    def __init__(self, packed: Packed, heads: Heads, rotary: Rotary) -> None:
        self.heads, self.prefix, self.rotary = heads, packed.prefix, rotary
        lengths, source, self.width = padded_places(packed)
        self.rows = len(lengths)
        self.grid = source.clamp(min=0)  # in the padding stands anything
        self.place = (source >= 0).nonzero().squeeze(1)
        hidden = torch.ones(self.width, self.width, dtype=torch.bool).triu(1)
        hidden = torch.cat([torch.zeros(self.width, packed.prefix, dtype=torch.bool), hidden], 1)
        hidden = hidden.repeat(self.rows if packed.prefix else 1, 1, 1)
        if packed.prefix:
            hidden[0, :, : packed.prefix] = True  # the beginning's own keys stand behind, as every row's
        mask = torch.zeros(hidden.shape, dtype=rotary.dtype).masked_fill_(hidden, torch.finfo(rotary.dtype).min)
        self.mask = mask[:, None, None]

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        """See `Attention.forward`."""
        heads, rows, width = self.heads, self.rows, self.width
        grid = turned(qkv, heads, self.rotary).index_select(0, self.grid).view(rows, width, heads.all, heads.width)
        queries = self._by_head(grid[:, :, : heads.queries])
        keys = self._with_prefix(grid[:, :, heads.queries : heads.queries + heads.keys])
        values = self._with_prefix(grid[:, :, heads.queries + heads.keys :])
        scores = torch.bmm(queries, keys.transpose(1, 2))
        shaped = scores.view(rows, heads.keys, -1, width, self.prefix + width)
        shaped += self.mask
        shares = torch.softmax(scores, -1)
        out = torch.bmm(shares, values).view(rows, heads.keys, -1, width, heads.width)
        out = out.permute(0, 3, 1, 2, 4).reshape(rows * width, -1)
        into.copy_(out.index_select(0, self.place))
        return queries, keys, values, shares

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """See `Attention.backward`."""
        del out
        queries, keys, values, shares = kept
        heads, rows, width = self.heads, self.rows, self.width
        d_mixed = d_out.sum()
        grid = d_mixed.new_zeros(rows * width, heads.queries * heads.width).index_copy_(0, self.place, d_mixed)
        d_result = self._by_head(grid.view(rows, width, heads.queries, heads.width))
        d_shares = torch.bmm(d_result, values.transpose(1, 2))
        d_scores = _softmax_backward(d_shares, shares, -1, shares.dtype)
        gradient = d_mixed.new_empty(rows, width, heads.all, heads.width)
        d_queries = torch.bmm(d_scores, keys).view(rows, heads.keys, -1, width, heads.width)
        torch.unflatten(gradient[:, :, : heads.queries], 2, (heads.keys, -1)).copy_(d_queries.permute(0, 3, 1, 2, 4))
        d_keys = self._without_prefix(torch.bmm(d_scores.transpose(1, 2), queries))
        d_values = self._without_prefix(torch.bmm(shares.transpose(1, 2), d_result))
        gradient[:, :, heads.queries : heads.queries + heads.keys] = d_keys
        gradient[:, :, heads.queries + heads.keys :] = d_values
        packed = gradient.view(rows * width, heads.all, heads.width).index_select(0, self.place)
        return turned_back(packed, heads, self.rotary)

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
        """Back from `_with_prefix`'s shape; what all rows did to the beginning's keys is its own row's."""
        split = gradient.view(self.rows, self.heads.keys, -1, self.heads.width)
        own = split[:, :, self.prefix :]
        if self.prefix:
            own[0, :, : self.prefix] += split[1:, :, : self.prefix].sum(0)
        return own.transpose(1, 2)


class LongAttention:
    """PyTorch's flash kernel for CPUs, chat by chat: memory grows with the length, not with its square."""

    def __init__(self, lengths: Sequence[int], heads: Heads, rotary: Rotary) -> None:
        self.lengths, self.heads, self.rotary = list(lengths), heads, rotary

    def forward(self, qkv: Tensor, into: Tensor) -> tuple[Tensor, ...]:
        """See `Attention.forward`."""
        kept = [turned(qkv, self.heads, self.rotary)]
        parts = zip(torch.split(kept[0], self.lengths), torch.split(into, self.lengths), strict=True)
        for part, result in parts:
            out, sums = _flash(*self._split(part), 0.0, True, scale=1.0)
            torch.unflatten(result, 1, (self.heads.queries, -1)).copy_(out[0].transpose(0, 1))
            kept.append(sums)
        return tuple(kept)

    def backward(self, d_out: InputGradient, out: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """See `Attention.backward`."""
        gradients = []
        of_chats = (torch.split(each, self.lengths) for each in (kept[0], d_out.sum(), out))
        for part, d_part, out_part, sums in zip(*of_chats, kept[1:], strict=True):
            queries, keys, values = self._split(part)
            d_shaped, out_shaped = (
                each.reshape(1, len(part), self.heads.queries, -1).transpose(1, 2) for each in (d_part, out_part)
            )
            found = _flash_backward(d_shaped, queries, keys, values, out_shaped, sums, 0.0, True, scale=1.0)
            d_keys, d_values = (
                torch.unflatten(each, 1, (self.heads.keys, -1)).sum(2)[0].transpose(0, 1) for each in found[1:]
            )
            gradients.append(torch.cat([found[0][0].transpose(0, 1), d_keys, d_values], 1))
        return turned_back(torch.cat(gradients), self.heads, self.rotary)

    def _split(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one chat, each ``[1, queries, length, d]``."""
        heads = self.heads
        by_head = part.view(len(part), heads.all, heads.width).transpose(0, 1)[None]
        queries, keys, values = torch.split(by_head, [heads.queries, heads.keys, heads.keys], 1)
        repeats = heads.queries // heads.keys
        return queries, keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)


def turned(qkv: Tensor, heads: Heads, rotary: Rotary) -> Tensor:
    """``[row, heads.all * width]`` with its queries and keys turned by their positions."""
    shaped = qkv.view(len(qkv), heads.all, heads.width)
    both = heads.queries + heads.keys
    result = torch.empty_like(shaped)
    result[:, both:] = shaped[:, both:]
    rotary.turn(shaped[:, :both], result[:, :both])
    return result.view(len(qkv), -1)


def turned_back(gradient: Tensor, heads: Heads, rotary: Rotary) -> Tensor:
    """The gradient ``[row, heads.all * width]`` of `turned`'s argument, from that of its result, by head."""
    both = heads.queries + heads.keys
    result = torch.empty_like(gradient)
    result[:, both:] = gradient[:, both:]
    rotary.turn_back(gradient[:, :both], result[:, :both])
    return result.view(len(gradient), -1)
