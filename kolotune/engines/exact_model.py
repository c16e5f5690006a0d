"""A model's predictions and greedy answers in fp32, by an engine's own passes over packed sequences, without training.

The engine is loaded by its name, as in `engine`: this module needs no PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from kolotune.weights.lora_delta import Delta

_ENGINE = "native"

Watch: TypeAlias = "Callable[[Tensor, Tensor, Tensor | int], None]"
"""Gets the inputs ``[tokens, in]`` of a linear layer, its outputs without the bias, ``[tokens, out]``, and how often
each token occurs, fp32 ``[tokens, 1]`` or one number: what sequences begin with in common is computed once."""


class ExactModel(Protocol):
    """A model with an adapter, which each sequence has or has not."""

    def logits(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], adapted: bool
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each sequence's index with its logits at its positions, fp32 ``[positions, vocabulary]``."""

    def losses(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], adapted: bool
    ) -> list[Tensor]:
        """Return each sequence's cross-entropy of the tokens behind its positions, fp32 ``[positions]``."""

    def answers(
        self, prompts: Sequence[Sequence[int]], adapted: Sequence[bool], end: int, longest: int
    ) -> list[list[int]]:
        """Return the ids of greedy answers to some prompts together; an answer that ends has the end token last."""

    def watch(self, watches: Mapping[str, Watch]) -> None:
        """Show what some linear layers compute, by their full names, until this is called again."""


def reason_unsupported(folder: Path, longest: int) -> str:
    """Return why a model has no such passes; "" if it has.

    Args:
        folder: of the model.
        longest: tokens of the longest sequence.
    """
    module = importlib.import_module(f"{__package__}.{_ENGINE}.exact_support")
    reason: str = module.reason_unsupported(folder, longest)
    return reason


def open_exact_model(folder: Path, adapter: Mapping[str, Delta]) -> ExactModel:
    """Load a model that is not unsupported.

    Args:
        folder: of the model.
        adapter: what it adds to linear layers, by the full names of their weights; plain products of two matrices.

    Raises:
        ArtifactError: a weight is missing or damaged, or the adapter changes what the model does not have.
    """
    module = importlib.import_module(f"{__package__}.{_ENGINE}.exact_decoder")
    model: ExactModel = module.PackedExactModel(folder, adapter)
    return model
