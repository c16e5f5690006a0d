"""What goes into the matrices of a model whose weights are not rounded, or out of them, one layer at a time.

Compensation needs it beside what goes into them once the weights before are rounded: a matrix is then rounded to give
the exact outputs from the inputs that it will really get. Inputs serve all matrices that read them. Where these have
fewer rows in all than columns, as the last matrix of an MLP, their outputs take less memory and less work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Exact:
    """What a matrix gets, or what it gives without its bias, while nothing is rounded; one of both is None.

    Attributes:
        inputs: fp32 ``[…, columns]``.
        outputs: fp32 ``[…, rows]``.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None


class ExactInputs:
    """Carries the hidden states of the exact model from layer to layer, and keeps what a layer's matrices get or give.

    Args:
        hidden: what goes into the first layer, ``[rows, tokens, width]``.
    """

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._tokens = hidden.shape[0] * hidden.shape[1]
        self._kept: dict[str, Exact] = {}

    def run(
        self, layer: nn.Module, matrices: Mapping[str, Any], arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Compute a layer, which has its exact weights.

        Args:
            layer: of the decoder.
            matrices: those whose inputs or outputs are wanted, by name.
            arguments, named: what the decoder gives the layer beside the hidden states.
        """
        self._kept = {}
        seen: dict[str, Exact] = {}
        handles = [module.register_forward_hook(_keep(seen, name)) for name, module in matrices.items()]
        output = layer.forward(self._hidden, *arguments, **named)
        self._hidden = output[0] if isinstance(output, tuple) else output
        for handle in handles:
            handle.remove()
        for name, exact in seen.items():
            sharing = [matrices[other].out_features for other in seen if seen[other].inputs is exact.inputs]
            by_outputs = sum(sharing) < matrices[name].in_features
            self._kept[name] = Exact(outputs=exact.outputs) if by_outputs else Exact(inputs=exact.inputs)

    def take(self, name: str, inputs: Tensor) -> Exact:
        """Return what went into a matrix or came out of it, and forget it.

        Args:
            name: of the matrix.
            inputs: what goes into it where weights are rounded.

        Returns:
            Those of the same tokens in the same order, ``[tokens, width]``; none for an expert that only some tokens
            reach: rounding may send other tokens there.
        """
        exact = self._kept.pop(name, Exact())
        tokens = inputs.numel() // inputs.shape[-1]

        def flat(tensor: Tensor | None) -> Tensor | None:
            is_same = tensor is not None and tensor.shape[:-1] == inputs.shape[:-1] and tokens == self._tokens
            return tensor.reshape(tokens, -1) if tensor is not None and is_same else None

        return Exact(flat(exact.inputs), flat(exact.outputs))


def _keep(seen: dict[str, Exact], name: str) -> Any:
    def keep(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        is_narrower = module.out_features < module.in_features
        without_bias = output if module.bias is None or not is_narrower else output - module.bias
        seen[name] = Exact(inputs[0], without_bias if is_narrower else None)

    return keep
