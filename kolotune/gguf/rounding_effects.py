"""What rounding a matrix to a type does to the tokens that a model predicts, to first order; see `sensitivity`."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kolotune.foundation.hardware import cores
from kolotune.llamacpp import ggml

from . import header
from .stored_values import dequantized

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_WEIGHTS_AT_ONCE = 1 << 18
_FEEDBACK_ROWS = 128  # of a matrix, by which is measured what error feedback gains


@dataclass
class RoundingEffects:
    """The effects of all types on all tensors, as far as they are measured.

    Attributes:
        effects: change of the log-probability of each token's successor, fp32 ``[tokens]``, by tensor and type.
        energies: for a matrix that sees other tokens than the rest, half the mean square of the change over all tokens.
        feedback: sums of squared changes (as ggml rounds, with error feedback), by part of the model and type.
    """

    effects: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    energies: dict[tuple[str, str], float] = field(default_factory=dict)
    feedback: dict[tuple[str, str], tuple[float, float]] = field(
        default_factory=lambda: defaultdict(lambda: (0.0, 0.0))
    )

    def add(self, name: str, kind: str, effect: Tensor) -> None:
        """Add an effect of a tensor; one that is used twice, as embedding and head, has two."""
        known = self.effects.get((name, kind))
        self.effects[name, kind] = effect if known is None else known + effect

    def add_feedback(self, part: str, kind: str, weight: Tensor, inputs: Tensor, gradients: Tensor) -> None:
        """Compare rounding with and without error feedback on some rows of a matrix.

        Args:
            part: of the model, such as "ffn_up"; its matrices share the result.
            kind: name of the type.
            weight: fp32 ``[rows, columns]``.
            inputs, gradients: of the tokens, ``[tokens, columns]`` and ``[tokens, rows]``.
        """
        from .error_feedback import input_statistics, round_with_feedback

        step = max(1, len(weight) // _FEEDBACK_ROWS)
        some, of_some = weight[::step].contiguous(), gradients[:, ::step]
        _, values = round_with_feedback(some, kind, input_statistics(inputs))
        plain = _squares(rounding_errors(some, kind, None), inputs, of_some)
        compensated = _squares(some - values, inputs, of_some)
        before = self.feedback[part, kind]
        self.feedback[part, kind] = (before[0] + plain, before[1] + compensated)


def rounding_errors(weight: Tensor, kind: str, importance: np.ndarray | None) -> Tensor:
    """Return what ggml's rounding of a matrix to a type changes, fp32 of the same shape.

    Args:
        weight: fp32 ``[rows, columns]``, whole blocks.
        kind: name of the type.
        importance: of each column; None: all alike.
    """
    import numpy as np
    import torch

    values = np.ascontiguousarray(weight.numpy())
    rows, columns = values.shape
    errors = np.empty_like(values)

    def round_rows(first: int) -> None:
        part = np.ascontiguousarray(values[first : first + step])
        blocks = np.empty(header.size_of(part.shape[::-1], kind), np.uint8)
        means = None if importance is None else importance.ctypes.data
        ggml.library().ggml_quantize_chunk(
            header.type_number(kind), part.ctypes.data, blocks.ctypes.data, 0, len(part), columns, means
        )
        errors[first : first + step] = dequantized(blocks, kind).reshape(part.shape) - part

    step = max(1, _WEIGHTS_AT_ONCE // columns)
    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(round_rows, range(0, rows, step)))
    return torch.from_numpy(errors)


def effect(errors: Tensor, inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return ``g · E x`` of each token.

    Args:
        errors: ``[rows, columns]``.
        inputs: ``[tokens, columns]``.
        gradients: ``[tokens, rows]``.
    """
    return ((inputs @ errors.T) * gradients).sum(dim=1)


def _squares(errors: Tensor, inputs: Tensor, gradients: Tensor) -> float:
    """Sum of the squared effects of single outputs: of few rows, whose sum would depend on which they are."""
    return float(((inputs @ errors.T) * gradients).square().sum())
