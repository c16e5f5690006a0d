"""The elementwise parts of a decoder's step, by PyTorch; `kernels.operations` has the same, compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attention import Attention, Heads, attention_for
from .packing import Packed
from .products import InputGradient, PlainProduct, Product
from .rotary import Rotary

_rms_norm: Any = torch.ops.aten._fused_rms_norm
_silu_backward: Any = torch.ops.aten.silu_backward


@dataclass
class Norm:
    """Root-mean-square normalisation (Zhang and Sennrich, 2019) with a frozen weight ``[width]``."""

    weight: Tensor
    epsilon: float

    def __post_init__(self) -> None:
        self._exact = self.weight.float()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., width]`` normalised, and the fp32 factor ``[..., 1]`` that `backward` needs."""
        result: tuple[Tensor, Tensor] = _rms_norm(x, [len(self.weight)], self.weight, self.epsilon)
        return result

    def backward(self, d_out: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """The gradient of x, in x's dtype."""
        unit = x * factor  # fp32, as the factor is
        scaled = d_out * self._exact
        shared = (scaled * unit).mean(-1, keepdim=True)
        return torch.addcmul(scaled, unit, shared, value=-1).mul_(factor).to(x.dtype)


class Operations(Protocol):
    """What a decoder's step needs beside matrix products."""

    def product(self, weight: Tensor, changing: int) -> Product:
        """The product with ``weight [outputs, inputs]``, whose columns from `changing` on will be replaced."""

    def lower(self, x: Tensor, down: Tensor, into: Tensor) -> None:
        """``x [row, width] · downᵀ`` into ``into [row, rank]``, of ``down [rank, width]``; rows may stand apart."""

    def add_product(self, gradient: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
        """Adds ``factor * leftᵀ · right`` to fp32 ``gradient [left, right]``, of ``[row, left]`` and ``[row, right]``.

        Rows may stand apart.
        """

    def attention(self, packed: Packed, heads: Heads, rotary: Rotary) -> Attention:
        """Attention for one packed row."""

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None, into: Tensor) -> tuple[Tensor, Tensor]:
        """Normalises ``x + added``, both ``[row, width]``, into `into`.

        Returns:
            The sum (which may lie where `x` lay), and the fp32 factor ``[row, 1]`` that `norm_backward` needs.
        """

    def norm_backward(
        self, norm: Norm, d_out: InputGradient, x: Tensor, factor: Tensor, added: Tensor | None
    ) -> Tensor:
        """The gradient ``[row, width]`` of the normalised x, plus `added`, the gradient that comes another way."""

    def gate(self, gate_up: Tensor, into: Tensor) -> None:
        """SwiGLU (Shazeer, 2020): ``silu(gate) * up`` of ``gate_up [row, 2 * width]`` into `into`."""

    def gate_backward(self, d_out: InputGradient, gate_up: Tensor) -> Tensor:
        """The gradient of gate_up, ``[row, 2 * width]``."""

    def cross_entropy(self, logits: Tensor, targets: Tensor, factor: float) -> tuple[float, Tensor]:
        """The summed loss of ``logits [labels, vocabulary]``, and `factor` times its gradient, in their dtype.

        The logits' memory may be used for the gradient.
        """


class PlainOperations:
    """See `Operations`."""

    def product(self, weight: Tensor, changing: int) -> Product:
        """See `Operations`."""
        del changing
        return PlainProduct(weight)

    def lower(self, x: Tensor, down: Tensor, into: Tensor) -> None:
        """See `Operations`."""
        into.copy_(x @ down.t())

    def add_product(self, gradient: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
        """See `Operations`."""
        gradient.add_(left.t() @ right, alpha=factor)

    def attention(self, packed: Packed, heads: Heads, rotary: Rotary) -> Attention:
        """See `Operations`."""
        return attention_for(packed, heads, rotary)

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None, into: Tensor) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        total = x if added is None else x.add_(added)
        normed, factor = norm.forward(total)
        into.copy_(normed)
        return total, factor

    def norm_backward(
        self, norm: Norm, d_out: InputGradient, x: Tensor, factor: Tensor, added: Tensor | None
    ) -> Tensor:
        """See `Operations`."""
        gradient = norm.backward(d_out.sum(), x, factor)
        return gradient if added is None else gradient.add_(added)

    def gate(self, gate_up: Tensor, into: Tensor) -> None:
        """See `Operations`."""
        gate, up = gate_up.chunk(2, 1)
        torch.mul(nn.functional.silu(gate), up, out=into)

    def gate_backward(self, d_out: InputGradient, gate_up: Tensor) -> Tensor:
        """See `Operations`."""
        gate, up = gate_up.chunk(2, 1)
        gradient, d_product = torch.empty_like(gate_up), d_out.sum()
        d_gate, d_up = gradient.chunk(2, 1)
        torch.mul(d_product, nn.functional.silu(gate), out=d_up)
        _silu_backward.grad_input(d_product * up, gate, grad_input=d_gate)
        return gradient

    def cross_entropy(self, logits: Tensor, targets: Tensor, factor: float) -> tuple[float, Tensor]:
        """See `Operations`."""
        logs = torch.log_softmax(logits, -1, dtype=torch.float32)
        loss = -float(logs.gather(1, targets[:, None]).sum())
        shares = logs.exp_()
        shares[torch.arange(len(targets)), targets] -= 1
        return loss, shares.mul_(factor).to(logits.dtype)
