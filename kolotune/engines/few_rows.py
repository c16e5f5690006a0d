"""Products of a few rows with large matrices, as in answers that grow token by token: as fast as weights are read.

PyTorch gives ``x Wᵀ`` of few rows to a library that reads W at a third of the memory's speed, or less. Of
``(W xᵀ)ᵀ``, which is the same, it reads W two to four times as fast.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_MOST_ROWS = 8
_ROWS = (1, 2, 4, 8)  # other numbers are slower than the next of these


def speed_up(model: Model) -> Model:
    """Have the linear modules of a model compute few rows in the faster way, which differs by rounding; return it."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _FewRowsLinear
    return model


class _FewRowsLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``inputs weightᵀ + bias``, as `torch.nn.functional.linear`.

    Args:
        inputs: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
    """
    rows = inputs.shape[:-1].numel()
    if not 0 < rows <= _MOST_ROWS:
        return nn.functional.linear(inputs, weight, bias)
    computed = next(size for size in _ROWS if size >= rows)
    columns = inputs.new_zeros(computed, inputs.shape[-1])
    columns[:rows] = inputs.reshape(rows, -1)
    # Contiguous, as some models (Llama 4) read pairs of numbers as complex ones.
    result = (weight @ columns.T)[:, :rows].T.contiguous().view(*inputs.shape[:-1], -1)
    return result if bias is None else result + bias
