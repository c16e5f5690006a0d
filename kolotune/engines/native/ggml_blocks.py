"""The values of ggml's blocks in PyTorch, on any device: those of ggml's own functions, bit for bit in fp32.

A block holds some weights of a row: their quants, whole numbers of a few bits, with one scale or several, and in some
types what is added to them. Products of scales and quants are exact in fp32, and of sums only the last is rounded, so
that the order of operations does not matter. Types are named as ggml names them; `gguf.block_layouts` writes quants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Dequantize = Callable[[Tensor], Tensor]
"""From blocks, uint8 ``[blocks, bytes]``, to fp32 ``[blocks, weights]``."""


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the fp16 number at some byte of each block, fp32 ``[blocks, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(bytes_: Tensor, together: int) -> Tensor:
    """Split bytes: the low four bits of `together` bytes come before their high ones."""
    parts = bytes_.view(len(bytes_), -1, 1, together)
    return torch.cat([parts & 15, parts >> 4], 2).flatten(1)


def _bits(bytes_: Tensor, width: int, together: int) -> Tensor:
    """Split bytes into numbers of `width` bits: the lowest bits of `together` bytes come first."""
    parts = bytes_.view(len(bytes_), -1, 1, together)
    return torch.cat([(parts >> shift) & (1 << width) - 1 for shift in range(0, 8, width)], 2).flatten(1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """Return the fifth bit of each of 32 quants, as 0 or 16, from four bytes."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    return (((blocks[:, start : start + 4, None] >> shifts) & 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:18], 16).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:20], 16).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 6:22], 16) | _fifth_bits(blocks, 2)
    return quants.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    quants = _nibbles(blocks[:, 8:24], 16) | _fifth_bits(blocks, 4)
    return quants.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_half(blocks, 0))


def _scaled(quants: Tensor, scales: Tensor) -> Tensor:
    """Multiply ``[blocks, weights]`` in equal portions by ``[blocks, portions]``."""
    by_portion = quants.view(*scales.shape, -1).float()
    return by_portion.mul_(scales[:, :, None])


def _scales_of_6_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight scales and eight minima of Q4_K and Q5_K, uint8 ``[blocks, 8]``, from 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], 1)
    minima = torch.cat([second & 63, third >> 4 | (second >> 6) << 4], 1)
    return scales, minima


def _with_minima(blocks: Tensor, quants: Tensor) -> Tensor:
    scales, minima = _scales_of_6_bits(blocks[:, 4:16])
    values = _scaled(quants, _half(blocks, 0) * scales)
    return values.sub_((_half(blocks, 2) * minima)[:, :, None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, _nibbles(blocks[:, 16:144], 32))


def _q5_k(blocks: Tensor) -> Tensor:
    high = _bits(blocks[:, 16:48], 1, 32) << 4
    return _with_minima(blocks, _nibbles(blocks[:, 48:176], 32) | high)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128], 64)
    high = _bits(blocks[:, 128:192], 2, 32) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8)
    return _scaled((low | high).view(torch.int8) - 32, _half(blocks, 208) * scales).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, 32:96], 2, 32)
    high = _bits(blocks[:, :32], 1, 32) << 2
    first, second, third = blocks[:, 96:100], blocks[:, 100:104], blocks[:, 104:108]
    upper = _bits(third, 2, 4) << 4
    scales = torch.cat([first & 15, second & 15, first >> 4, second >> 4], 1) | upper
    return _scaled((low | high).view(torch.int8) - 4, _half(blocks, 108) * (scales.view(torch.int8) - 32)).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    values = _scaled(_bits(blocks[:, 16:80], 2, 32), _half(blocks, 80) * (scales & 15))
    return values.sub_((_half(blocks, 82) * (scales >> 4))[:, :, None]).flatten(1)


TYPES: dict[str, tuple[int, int, Dequantize]] = {
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "Q2_K": (256, 84, _q2_k),
    "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
"""Weights of a block, its bytes, and its values."""


def dequantize(rows: Tensor, kind: str) -> Tensor:
    """Return the values of rows of blocks, fp32 ``[rows, columns]``.

    Args:
        rows: uint8 ``[rows, bytes of a row]``.
        kind: the type, one of `TYPES`.
    """
    _, size, function = TYPES[kind]
    return function(rows.reshape(-1, size)).view(len(rows), -1)
