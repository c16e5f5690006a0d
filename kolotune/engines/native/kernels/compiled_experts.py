"""The weights of experts, fp32, multiplied by the compiled kernels of `experts.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..expert_linear import ExpertRows, PlainExpertLinear
from ..expert_products import CountedProducts, Groups
from .stored_matrices import STORED, in_bf16_if_exact

_POINTER, _COUNT, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_PRODUCT = [_POINTER] * 5
ARGUMENTS = {
    **{f"experts_{way}_{stored}": _PRODUCT for way in ("forward", "backward") for stored in STORED.values()},
    "experts_gradient": [_POINTER, _COUNT, _POINTER, _COUNT, _POINTER, _COUNT, _POINTER, _COUNT],
}
"""The functions of the library that `CompiledExpertLinear` calls, and their arguments."""


class _Weight(ctypes.Structure):
    """`ExpertWeight` of experts.h."""

    _fields_ = (
        ("frozen", _POINTER), ("a", _POINTER), ("b", _POINTER), ("experts", _COUNT), ("outputs", _COUNT),
        ("inputs", _COUNT), ("rank", _COUNT), ("scale", _REAL),
    )  # fmt: skip


class _RowAddresses(ctypes.Structure):
    """`Rows` of experts.h."""

    _fields_ = (("numbers", _POINTER), ("index", _POINTER), ("stride", _COUNT))

    @classmethod
    def of(cls, rows: ExpertRows) -> _RowAddresses:
        numbers, index = rows.numbers, rows.index
        assert numbers.stride(1) == 1
        return cls(numbers.data_ptr(), None if index is None else index.data_ptr(), numbers.stride(0))


class CompiledExpertLinear(PlainExpertLinear):
    """`ExpertLinear` by the compiled kernels: the experts' products side by side, of rows that are not gathered.

    With dropout, which PEFT does not have on experts, PyTorch multiplies the adapters.

    Args:
        weight: ``[experts, outputs, inputs]``, fp32 or bf16; kept in bf16 if that holds it exactly.
        functions: of the library.
    """

    def __init__(self, weight: Tensor, functions: Mapping[str, Callable[..., None]]) -> None:
        super().__init__(CountedProducts(), in_bf16_if_exact(weight.flatten(0, 1)).view(weight.shape))
        stored = STORED[self.weight.dtype]
        self._forward, self._backward = (functions[f"experts_{way}_{stored}"] for way in ("forward", "backward"))
        self._gradient = functions["experts_gradient"]

    def forward(self, x: ExpertRows, groups: Groups, masks: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        update = self.update
        if masks is not None and update is not None and isinstance(update.dropout, nn.Dropout):
            return super().forward(x, groups, masks)
        low = x.numbers.new_empty(sum(groups), 0 if update is None else update.lora_A.shape[1])
        return self._multiplied(self._forward, x, groups, low, self.weight.shape[1]), low

    def backward(
        self, d_out: ExpertRows, x: ExpertRows, low: Tensor, groups: Groups, masks: list[Tensor] | None
    ) -> Tensor:
        if masks:
            return super().backward(d_out, x, low, groups, masks)
        d_low = torch.empty_like(low)
        d_x = self._multiplied(self._backward, d_out, groups, d_low, self.weight.shape[2])
        if self.update is not None:
            a, b = self.update.lora_A.grad, self.update.lora_B.grad
            assert a is not None and b is not None
            self._add_gradient(a, d_low, x, groups, transposed=False)
            self._add_gradient(b, low, d_out, groups, transposed=True)
        return d_x

    def frozen_forward(self, rows: Tensor, groups: Groups) -> Tensor:
        return self._multiplied(
            self._forward, ExpertRows(rows), groups, rows.new_empty(len(rows), 0), self.weight.shape[1]
        )

    def frozen_backward(self, d_rows: Tensor, groups: Groups) -> Tensor:
        low = d_rows.new_empty(len(d_rows), 0)
        return self._multiplied(self._backward, ExpertRows(d_rows), groups, low, self.weight.shape[2])

    def _multiplied(self, function: Any, rows: ExpertRows, groups: Groups, low: Tensor, width: int) -> Tensor:
        """Return the product ``[rows, width]``, and fill in `low`, the adapters' thin one, unless it has no columns."""
        rank, starts = low.shape[1], _starts(groups)
        update = self.update if rank else None
        adapters: tuple[int | None, int | None, float] = (None, None, 0.0)
        if update is not None:
            adapters = _address(update.lora_A), _address(update.lora_B), update.scale
        a, b, scale = adapters
        weight = _Weight(self.weight.data_ptr(), a, b, *self.weight.shape, rank, scale)
        out = low.new_empty(len(low), width)
        function(
            ctypes.byref(weight),
            starts.data_ptr(),
            ctypes.byref(_RowAddresses.of(rows)),
            low.data_ptr(),
            out.data_ptr(),
        )
        return out

    def _add_gradient(
        self, gradient: Tensor, thin: Tensor, wide: ExpertRows, groups: Groups, *, transposed: bool
    ) -> None:
        starts, width = _starts(groups), wide.numbers.shape[1]
        self._gradient(
            starts.data_ptr(), len(starts) - 1, thin.data_ptr(), thin.shape[1], ctypes.byref(_RowAddresses.of(wide)),
            width, _address(gradient), transposed,
        )  # fmt: skip


def _address(matrices: Tensor) -> int:
    assert matrices.is_contiguous() and matrices.dtype == torch.float32
    return matrices.data_ptr()


def _starts(groups: Groups) -> Tensor:
    """Return int64 ``[experts + 1]``: where the rows of each expert begin, and the end."""
    assert not isinstance(groups, Tensor)
    return torch.tensor([0, *accumulate(groups)])
