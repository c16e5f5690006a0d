"""What goes into the matrices of a model whose weights are not rounded, one layer at a time.

Compensation needs it beside what goes into them once the weights before are rounded: a matrix is then rounded to give
the exact outputs from the inputs that it will really get.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


class ExactInputs:
    """Carries the hidden states of the exact model from layer to layer, and keeps what a layer's matrices get.

    Args:
        hidden: what goes into the first layer, ``[rows, tokens, width]``.
    """

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._tokens = hidden.shape[0] * hidden.shape[1]
        self._inputs: dict[str, Tensor] = {}

    def run(
        self, layer: nn.Module, matrices: Mapping[str, nn.Module], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Compute a layer, which has its exact weights.

        Args:
            layer: of the decoder.
            matrices: those whose inputs are wanted, by name.
            arguments, named: what the decoder gives the layer beside the hidden states.
        """
        self._inputs = {}
        handles = [module.register_forward_pre_hook(self._keep(name)) for name, module in matrices.items()]
        output = layer.forward(self._hidden, *arguments, **named)
        self._hidden = output[0] if isinstance(output, tuple) else output
        for handle in handles:
            handle.remove()

    def take(self, name: str, inputs: Tensor) -> Tensor | None:
        """Return what went into a matrix, and forget it.

        Args:
            name: of the matrix.
            inputs: what goes into it where weights are rounded.

        Returns:
            The same tokens' exact inputs, shaped as `inputs`; None for an expert that only some tokens reach: rounding
            may send other tokens there.
        """
        exact = self._inputs.pop(name, None)
        tokens = inputs.numel() // inputs.shape[-1]
        return exact if exact is not None and exact.shape == inputs.shape and tokens == self._tokens else None

    def _keep(self, name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs[name] = inputs[0]

        return keep
