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

_ROWS = 4  # of tokens that are computed together: what is computed of them and not kept stays small


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
        import torch

        seen: dict[str, Exact] = {}
        pieces: dict[str, list[Exact]] = {name: [] for name in matrices}
        handles = [module.register_forward_hook(_keep(seen, name)) for name, module in matrices.items()]
        count, hidden, outputs = len(self._hidden), self._hidden, []
        for first in range(0, count, _ROWS):
            rows = slice(first, first + _ROWS)
            given = (_of_rows(value, rows, count) for value in arguments)
            output = layer.forward(hidden[rows], *given, **{name: _of_rows(named[name], rows, count) for name in named})
            outputs.append(output[0] if isinstance(output, tuple) else output)
            for name in seen:
                pieces[name].append(_smaller(name, seen, matrices))
            seen.clear()
        for handle in handles:
            handle.remove()
        self._hidden = torch.cat(outputs)
        self._kept = _joined(pieces)

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


def _of_rows(value: Any, rows: slice, count: int) -> Any:
    """Return what a layer is given for some of its rows; what all rows share is one, or not by rows."""
    if isinstance(value, (tuple, list)):
        return type(value)(_of_rows(each, rows, count) for each in value)
    is_by_rows = hasattr(value, "shape") and value.ndim > 1 and value.shape[0] == count
    return value[rows] if is_by_rows else value


def _smaller(name: str, seen: Mapping[str, Exact], matrices: Mapping[str, Any]) -> Exact:
    """Return the inputs or the outputs of a matrix, of which those take less memory that all its readers need."""
    exact = seen[name]
    readers = [matrices[other].out_features for other in seen if seen[other].inputs is exact.inputs]
    by_outputs = sum(readers) < matrices[name].in_features
    return Exact(outputs=exact.outputs) if by_outputs else Exact(inputs=exact.inputs)


def _joined(pieces: Mapping[str, list[Exact]]) -> dict[str, Exact]:
    """Join the pieces of each matrix; what several read is one tensor."""
    import torch

    whole: dict[tuple[int, ...], Tensor] = {}

    def joined(tensors: list[Tensor]) -> Tensor | None:
        key = tuple(map(id, tensors))
        if tensors and key not in whole:
            whole[key] = torch.cat(tensors)
        return whole.get(key)

    return {
        name: Exact(*(joined([each for each in kind if each is not None]) for kind in zip(*some, strict=True)))
        for name, pairs in pieces.items()
        if (some := [(piece.inputs, piece.outputs) for piece in pairs])
    }


def _keep(seen: dict[str, Exact], name: str) -> Any:
    def keep(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        is_narrower = module.out_features < module.in_features
        without_bias = output if module.bias is None or not is_narrower else output - module.bias
        seen[name] = Exact(inputs[0], without_bias if is_narrower else None)

    return keep
