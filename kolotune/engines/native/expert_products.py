"""Products of sorted rows with the weights of their experts, where each expert has another number of rows.

On a CPU the host knows these numbers, and computes one expert after the other. On a GPU it would have to wait for them
in every layer: there PyTorch's grouped products read them on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

Groups: TypeAlias = Sequence[int] | Tensor
"""How many rows each expert has; or where its rows end, int32 ``[experts]``, on the device."""

_FIRST_CAPABILITY = (8, 0)
_ALIGNED = 8  # numbers in bf16; PyTorch's kernel wants rows at multiples of 16 bytes
_grouped: Any = nn.functional.grouped_mm


class ExpertProducts(Protocol):
    """Products of ``[rows, …]``, sorted by experts, with ``weights [experts, outputs, inputs]``."""

    def groups(self, experts: Tensor, count: int) -> Groups:
        """Return how the rows belong to experts.

        Args:
            experts: of each row, sorted, int64 ``[rows]``.
            count: the number of experts.
        """

    def forward(self, x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """Return ``[rows, outputs]`` from ``[rows, inputs]``."""

    def add_forward(self, out: Tensor, x: Tensor, weights: Tensor, groups: Groups, factor: float) -> None:
        """Add `factor` times the result of `forward` to `out`."""

    def backward(self, d_out: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """Return ``[rows, inputs]`` from ``[rows, outputs]``."""

    def add_gradient(self, gradient: Tensor, left: Tensor, right: Tensor, groups: Groups, factor: float) -> None:
        """Add `factor` times ``leftᵀ · right`` of each expert's rows to fp32 ``gradient [experts, left, right]``."""


class CountedProducts:
    """One expert after the other."""

    def groups(self, experts: Tensor, count: int) -> Groups:
        counts: list[int] = torch.bincount(experts, minlength=count).tolist()
        return counts

    def forward(self, x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        out = x.new_empty(len(x), weights.shape[1])
        for expert, rows in _spans(groups):
            torch.mm(x[rows], weights[expert].t(), out=out[rows])
        return out

    def add_forward(self, out: Tensor, x: Tensor, weights: Tensor, groups: Groups, factor: float) -> None:
        for expert, rows in _spans(groups):
            out[rows].addmm_(x[rows], weights[expert].t(), alpha=factor)

    def backward(self, d_out: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        d_x = d_out.new_empty(len(d_out), weights.shape[2])
        for expert, rows in _spans(groups):
            torch.mm(d_out[rows], weights[expert], out=d_x[rows])
        return d_x

    def add_gradient(self, gradient: Tensor, left: Tensor, right: Tensor, groups: Groups, factor: float) -> None:
        for expert, rows in _spans(groups):
            gradient[expert].add_(left[rows].t() @ right[rows], alpha=factor)


class GroupedProducts:
    """All experts at once. It was never run on a GPU; on a CPU PyTorch computes the same one by one."""

    def groups(self, experts: Tensor, count: int) -> Groups:
        return torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True).to(torch.int32)

    def forward(self, x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        result: Tensor = _grouped(_wide(x), _wide(weights).transpose(1, 2), offs=groups)
        return result

    def add_forward(self, out: Tensor, x: Tensor, weights: Tensor, groups: Groups, factor: float) -> None:
        out.add_(self.forward(x, weights, groups), alpha=factor)

    def backward(self, d_out: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        inputs, short = weights.shape[2], -weights.shape[1] % _ALIGNED
        weights = nn.functional.pad(_wide(weights), (0, 0, 0, short)) if short else _wide(weights)
        result: Tensor = _grouped(_wide(d_out), weights, offs=groups)
        return result[:, :inputs]

    def add_gradient(self, gradient: Tensor, left: Tensor, right: Tensor, groups: Groups, factor: float) -> None:
        found = _grouped(_wide(left).t(), _wide(right), offs=groups)
        gradient.add_(found[:, : left.shape[1], : right.shape[1]], alpha=factor)


def products_for(device: torch.device, dtype: torch.dtype) -> ExpertProducts:
    """Return what computes experts on a device without waiting for it, if PyTorch has that."""
    if device.type in ("cpu", "meta"):
        return GroupedProducts()
    if device.type != "cuda" or torch.version.hip or dtype != torch.bfloat16:
        return CountedProducts()
    is_new = torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
    return GroupedProducts() if is_new else CountedProducts()


def _wide(x: Tensor) -> Tensor:
    """Pad rows with zeros to whole alignments; thin matrices of adapters are the only ones that need it."""
    short = -x.shape[-1] % _ALIGNED
    return nn.functional.pad(x, (0, short)) if short else x


def _spans(groups: Groups) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and these."""
    assert not isinstance(groups, Tensor)
    start = 0
    for expert, count in enumerate(groups):
        if count:
            yield expert, slice(start, start + count)
        start += count
