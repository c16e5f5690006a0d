"""The parts of a decoder's step between matrix products: what they are, and PyTorch's implementation.

`kernels.compiled_operations` is the compiled implementation, `device_operations` that for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .architecture import Activation
from .attention import Attention, Heads, attention_for
from .attention_limits import Limits, cap_scores
from .expert_linear import ExpertLinear, PlainExpertLinear
from .expert_products import CountedProducts, ExpertProducts
from .matrix_product import InputGradient, PlainProduct, Product
from .rotary import Rotary
from .sequence_packing import PackedSequence

_rms_norm: Any = torch.ops.aten._fused_rms_norm
_silu_backward: Any = torch.ops.aten.silu_backward
_gelu_backward: Any = torch.ops.aten.gelu_backward


@dataclass(frozen=True)
class LogitScaling:
    """What is done to logits before the softmax.

    Attributes:
        factor: they are multiplied by this.
        cap: then they become ``cap * tanh(logit / cap)``; 0.0 for no cap.
    """

    factor: float = 1.0
    cap: float = 0.0


@dataclass
class Norm:
    """Root-mean-square normalization (Zhang and Sennrich, 2019) with a frozen weight ``[width]``.

    Some models store the weight less 1 (`stored_less`), since the whole would lose digits in bf16.
    """

    weight: Tensor
    epsilon: float
    stored_less: int = 0

    def __post_init__(self) -> None:
        self._exact = self.weight.float() + self.stored_less

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize ``[..., width]``; return also the fp32 factor ``[..., 1]`` that `backward` needs."""
        if not self.stored_less:
            result: tuple[Tensor, Tensor] = _rms_norm(x, [len(self.weight)], self.weight, self.epsilon)
            return result
        exact = x.float()
        factor = exact.square().mean(-1, keepdim=True).add_(self.epsilon).rsqrt_()
        return exact.mul(factor).mul_(self._exact).to(x.dtype), factor

    def backward(self, d_out: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """Return the gradient of x, in the dtype of x."""
        unit = x * factor  # fp32, as the factor is
        scaled = d_out * self._exact
        shared = (scaled * unit).mean(-1, keepdim=True)
        return torch.addcmul(scaled, unit, shared, value=-1).mul_(factor).to(x.dtype)


class Operations(Protocol):
    """What a decoder's step needs besides matrix products. Rows of a tensor need not be contiguous.

    Attributes:
        widens: whether `product` also takes bf16 matrices for fp32 numbers.
    """

    widens: bool

    def product(self, weight: Tensor, changing: int) -> Product:
        """Prepare products with ``weight [outputs, inputs]``, whose columns from `changing` on will be replaced."""

    def lower(self, x: Tensor, down: Tensor, into: Tensor) -> None:
        """Compute ``x [tokens, width] · downᵀ`` into ``into [tokens, rank]``, with ``down [rank, width]``."""

    def add_product(self, gradient: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
        """Add ``factor * leftᵀ · right``, of ``[tokens, …]``, to fp32 ``gradient [left, right]``."""

    def expert_products(self, router: Tensor) -> ExpertProducts:
        """Return what computes experts in a router's dtype, on its device."""

    def expert_linear(self, weight: Tensor, products: ExpertProducts) -> ExpertLinear:
        """Prepare products with ``weight [experts, outputs, inputs]``, by `products` or faster."""

    def attention(self, packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits) -> Attention:
        """Return the attention for one packed sequence."""

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None, into: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize ``x + added``, both ``[tokens, width]``, into `into`.

        Returns:
            The sum, possibly in the memory of `x`, and the fp32 factor ``[tokens, 1]`` that `norm_backward` needs.
        """

    def norm_backward(
        self, norm: Norm, d_out: InputGradient, x: Tensor, factor: Tensor, added: Tensor | None
    ) -> Tensor:
        """Return the gradient of x, ``[tokens, width]``, plus `added`, its gradient from the residual connection."""

    def gate(self, activation: Activation, gate_up: Tensor, into: Tensor) -> None:
        """Compute ``activation(gate) * up`` (Shazeer, "GLU Variants", 2020) of ``gate_up [tokens, 2 * width]``."""

    def gate_backward(self, activation: Activation, d_out: InputGradient, gate_up: Tensor) -> Tensor:
        """Return the gradient of gate_up, ``[tokens, 2 * width]``."""

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, factor: float, scaling: LogitScaling
    ) -> tuple[Tensor, Tensor]:
        """Return the fp32 loss of each row of ``logits [labels, vocabulary]``, and `factor` times its gradient.

        The gradient is in the logits' dtype, and may overwrite them. They are scaled first.
        """


class PlainOperations:
    """`Operations` by PyTorch."""

    widens = False

    def product(self, weight: Tensor, changing: int) -> Product:
        del changing
        return PlainProduct(weight)

    def lower(self, x: Tensor, down: Tensor, into: Tensor) -> None:
        into.copy_(x @ down.t())

    def add_product(self, gradient: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
        gradient.add_(left.t() @ right, alpha=factor)

    def expert_products(self, router: Tensor) -> ExpertProducts:
        return CountedProducts()

    def expert_linear(self, weight: Tensor, products: ExpertProducts) -> ExpertLinear:
        return PlainExpertLinear(products, weight)

    def attention(self, packed: PackedSequence, heads: Heads, rotary: Rotary, limits: Limits) -> Attention:
        return attention_for(packed, heads, rotary, limits)

    def norm(self, norm: Norm, x: Tensor, added: Tensor | None, into: Tensor) -> tuple[Tensor, Tensor]:
        total = x if added is None else x.add_(added)
        normed, factor = norm.forward(total)
        into.copy_(normed)
        return total, factor

    def norm_backward(
        self, norm: Norm, d_out: InputGradient, x: Tensor, factor: Tensor, added: Tensor | None
    ) -> Tensor:
        gradient = norm.backward(d_out.sum(), x, factor)
        return gradient if added is None else gradient.add_(added)

    def gate(self, activation: Activation, gate_up: Tensor, into: Tensor) -> None:
        gate, up = gate_up.chunk(2, 1)
        torch.mul(_activated(activation, gate), up, out=into)

    def gate_backward(self, activation: Activation, d_out: InputGradient, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, 1)
        gradient, d_product = torch.empty_like(gate_up), d_out.sum()
        d_gate, d_up = gradient.chunk(2, 1)
        torch.mul(d_product, _activated(activation, gate), out=d_up)
        if activation == Activation.SILU:
            _silu_backward.grad_input(d_product * up, gate, grad_input=d_gate)
        else:
            _gelu_backward.grad_input(d_product * up, gate, approximate="tanh", grad_input=d_gate)
        return gradient

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, factor: float, scaling: LogitScaling
    ) -> tuple[Tensor, Tensor]:
        if scaling.factor != 1.0:
            logits.mul_(scaling.factor)
        slopes = cap_scores(logits, scaling.cap)
        logs = torch.log_softmax(logits, -1, dtype=torch.float32)
        losses = -logs.gather(1, targets[:, None]).squeeze(1)
        shares = logs.exp_()
        shares.scatter_add_(1, targets[:, None], shares.new_full((len(targets), 1), -1))
        shares.mul_(factor * scaling.factor)
        for slope in slopes:
            shares *= slope
        return losses, shares.to(logits.dtype)


def _activated(activation: Activation, gate: Tensor) -> Tensor:
    if activation == Activation.SILU:
        return nn.functional.silu(gate)
    return nn.functional.gelu(gate, approximate="tanh")
