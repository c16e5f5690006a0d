"""The MLP of a decoder's layer, dense: forward and backward. `experts` has that of layers with experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .architecture import Activation
from .expert_products import Groups
from .fused_linear import FusedLinear
from .matrix_product import InputGradient
from .operations import Operations


@dataclass
class SavedMlp:
    """What an MLP's backward pass needs of its forward pass, besides its input.

    Attributes:
        tensors: by name.
        masks: of dropout, by the name of a linear layer or of an experts' weight.
        groups: how the rows of experts belong to these.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, list[Tensor]] = field(default_factory=dict)
    groups: Groups = ()


class Mlp(Protocol):
    """The MLP of a layer.

    Attributes:
        inputs: width of its input.
    """

    inputs: int

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        """Its linear layers that all tokens take."""

    def new_input(self, tokens: int) -> Tensor:
        """Allocate an input ``[tokens, inputs or more]``, of which the caller fills the first `inputs` columns."""

    def forward(self, x: Tensor, saved: SavedMlp | None) -> Tensor:
        """Compute ``[tokens, inputs]`` from `new_input`; in training, `saved` receives what `backward` needs."""

    def backward(self, d_out: Tensor, x: Tensor, saved: SavedMlp) -> InputGradient:
        """Add to the adapters' gradients; return that of the input ``x``."""


class DenseMlp:
    """Gate and up as one product, and down.

    The input of `down` is computed again for the backward pass: with what norms write that takes a fiftieth of a step
    (measured on SmolLM2), and kept it would be a fifth of all that is kept.

    Args:
        operations: computes the activation.
        activation: of the gate.
        gate_up, down: the linear layers.
    """

    def __init__(self, operations: Operations, activation: Activation, gate_up: FusedLinear, down: FusedLinear) -> None:
        self._operations, self._activation = operations, activation
        self._gate_up, self._down = gate_up, down
        self.inputs = gate_up.inputs

    @property
    def linears(self) -> tuple[FusedLinear, ...]:
        return self._gate_up, self._down

    def new_input(self, tokens: int) -> Tensor:
        return self._gate_up.new_input(tokens)

    def forward(self, x: Tensor, saved: SavedMlp | None) -> Tensor:
        masks: dict[str, list[Tensor]] = {"gate_up": [], "down": []}
        gate_up = self._gate_up.forward(x, None if saved is None else masks["gate_up"])
        product = self._down.new_input(len(x))
        self._operations.gate(self._activation, gate_up, product[:, : self._down.inputs])
        out = self._down.forward(product, None if saved is None else masks["down"])
        if saved is not None:
            saved.tensors = {"gate_up": gate_up, "low": product[:, self._down.inputs :].clone()}
            saved.masks = {name: of_rows for name, of_rows in masks.items() if of_rows}
        return out

    def backward(self, d_out: Tensor, x: Tensor, saved: SavedMlp) -> InputGradient:
        gate_up, product = saved.tensors["gate_up"], self._down.new_input(len(x))
        self._operations.gate(self._activation, gate_up, product[:, : self._down.inputs])
        product[:, self._down.inputs :] = saved.tensors["low"]
        d_product = self._down.backward(d_out, product, saved.masks.get("down"))
        d_gate_up = self._operations.gate_backward(self._activation, d_product, gate_up)
        return self._gate_up.backward(d_gate_up, x, saved.masks.get("gate_up"))
