"""Frozen matrices of fp32 computations, kept in bf16 where that holds them exactly, as most weights are published."""

from __future__ import annotations

import torch
from torch import Tensor

STORED = {torch.float32: "of_fp32", torch.bfloat16: "of_bf16"}
"""The ends of the names of the library's functions for matrices stored in a dtype."""
_ROWS_AT_ONCE = 4096


def in_bf16_if_exact(weight: Tensor) -> Tensor:
    """Return ``[rows, columns]`` in bf16 if that holds all numbers exactly, else as they are; contiguous."""
    if weight.dtype == torch.bfloat16:
        return weight.contiguous()
    narrow = torch.empty(weight.shape, dtype=torch.bfloat16)
    for rows, part in zip(*(torch.split(each, _ROWS_AT_ONCE) for each in (narrow, weight)), strict=True):
        if not torch.equal(rows.copy_(part).float(), part):
            return weight.contiguous()
    return narrow
