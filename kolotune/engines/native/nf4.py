"""Frozen matrices in 4 bits, NF4 in blocks of 64, dequantized one at a time when they are multiplied.

NF4 has 16 levels, quantiles of a normal distribution between -1 and 1; a block's levels are scaled by its largest
magnitude (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023). Bytes and scales are laid out as
those of bitsandbytes, whose CUDA kernel dequantizes where that package is installed.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .matrix_product import DequantizedProduct
from .memory import CPU_AT_ONCE, NF4_AT_ONCE, NF4_BLOCK

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""From appendix E of the paper."""


@dataclass(frozen=True)
class Nf4Matrix:
    """A quantized matrix.

    Attributes:
        codes: uint8 ``[weights / 2]``: two levels in each byte, the first one in its upper half.
        scales: fp32 ``[blocks]``: the largest magnitude of each block.
        shape: of the matrix.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in `dtype`."""
        if self.codes.is_cuda and _has_bitsandbytes():
            return self._dequantize_by_bitsandbytes(dtype)
        result = torch.empty(NF4_BLOCK * len(self.scales), dtype=dtype, device=self.codes.device)
        pairs = _pairs(self.codes.device)
        step = min(NF4_AT_ONCE, CPU_AT_ONCE) if self.codes.device.type == "cpu" else NF4_AT_ONCE
        for start in range(0, len(result), step):
            end = start + step
            levels = pairs.index_select(0, self.codes[start // 2 : end // 2].int()).view(torch.float32)
            scales = self.scales[start // NF4_BLOCK : end // NF4_BLOCK, None]
            result[start:end].view(-1, NF4_BLOCK).copy_(levels.view(-1, NF4_BLOCK).mul_(scales))
        return result[: self.shape.numel()].view(self.shape)

    def _dequantize_by_bitsandbytes(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes import functional

        levels = _levels(self.codes.device)
        state = functional.QuantState(
            absmax=self.scales, shape=self.shape, code=levels, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype
        )
        result: Tensor = functional.dequantize_4bit(self.codes[:, None], state)
        return result


@functools.cache
def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two levels of each byte, fp32, as one number's bits, which is faster to index: int64 ``[256]``."""
    pairs = torch.tensor([(high, low) for high in LEVELS for low in LEVELS])
    return pairs.view(torch.int64).flatten().to(device)


def quantize(weight: Tensor) -> Nf4Matrix:
    """Quantize a matrix to the nearest levels, block by block along its rows; the last block may be padded by zeros."""
    flat = weight.flatten()
    flat = nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK))
    levels = _levels(weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes, scales = [], []
    for start in range(0, len(flat), NF4_AT_ONCE):
        blocks = flat[start : start + NF4_AT_ONCE].view(-1, NF4_BLOCK).float()
        scale = blocks.abs().amax(1)
        nearest = torch.bucketize(blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None], between)
        pairs = nearest.to(torch.uint8).view(-1, 2)
        codes.append((pairs[:, 0] << 4) | pairs[:, 1])
        scales.append(scale)
    return Nf4Matrix(torch.cat(codes), torch.cat(scales), weight.shape)


class Nf4Product(DequantizedProduct):
    """The product with a matrix in 4 bits.

    Args:
        weight: ``[outputs, inputs]``; it is not kept.
        changing: the first of the adapters' columns.
    """

    def __init__(self, weight: Tensor, changing: int) -> None:
        super().__init__(quantize(weight[:, :changing].contiguous()), weight[:, changing:])
