"""Rows of new tokens, in the embedding and in the head, which are trained whole beside the frozen others.

They are fp32, as adapters are. The frozen matrices have zeros in their place, so that the products with these matrices
leave them out, in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ROWS = "trainable_tokens_delta"
"""The trained tensor, as an attribute and in PEFT's files."""


class NewTokenRows:
    """The trained rows of one matrix.

    Args:
        matrix: ``[vocabulary, width]``; its rows for the tokens become zeros.
        first, count: the tokens, whose ids follow each other.

    Attributes:
        trainable_tokens_delta: the rows, ``[count, width]``, in place of those of the matrix.
        first: id of the first token.
    """

    parts = (ROWS,)

    def __init__(self, matrix: Tensor, first: int, count: int) -> None:
        self.first = first
        rows = matrix[self.columns(count)]
        self.start = rows.to("cpu", torch.float32, copy=True)
        self.trainable_tokens_delta = nn.Parameter(self.start.clone())
        rows.zero_()

    def columns(self, count: int | None = None) -> slice:
        """Return the tokens' rows of the matrix, which are their columns of the logits."""
        return slice(self.first, self.first + (len(self.trainable_tokens_delta) if count is None else count))

    def to(self, device: torch.device) -> None:
        """Move the rows to a device."""
        self.trainable_tokens_delta = nn.Parameter(self.trainable_tokens_delta.detach().to(device))

    def look_up(self, ids: Tensor, x: Tensor) -> None:
        """Fill in the rows of new tokens among embedded ``ids [tokens]``, in ``x [tokens, width]``."""
        is_new, rows = self._found(ids, x.device)
        x.copy_(torch.where(is_new, self.trainable_tokens_delta.detach().to(x.dtype)[rows], x))

    def look_up_backward(self, ids: Tensor, d_x: Tensor, factor: float) -> None:
        """Add to the rows' gradient, given that of the embedded ids and the factor of embeddings."""
        is_new, rows = self._found(ids, d_x.device)
        assert self.trainable_tokens_delta.grad is not None
        self.trainable_tokens_delta.grad.index_add_(0, rows, d_x.float().mul_(is_new), alpha=factor)

    def add_logits(self, x: Tensor, logits: Tensor) -> None:
        """Fill in the logits of the new tokens: ``x [tokens, width]``, ``logits [tokens, vocabulary]``."""
        torch.mm(x, self.trainable_tokens_delta.detach().to(x.dtype).t(), out=logits[:, self.columns()])

    def logits_backward(self, d_logits: Tensor) -> Tensor:
        """Return the part of x's gradient that flows through the new tokens' logits, ``[tokens, width]``."""
        return d_logits @ self.trainable_tokens_delta.detach().to(d_logits.dtype)

    def add_head_gradient(self, d_logits: Tensor, x: Tensor) -> None:
        """Add to the rows' gradient, given that of their logits, ``[tokens, count]``, and ``x [tokens, width]``."""
        assert self.trainable_tokens_delta.grad is not None
        self.trainable_tokens_delta.grad += (d_logits.t() @ x).float()

    def _found(self, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which ids are new tokens, ``[tokens, 1]``, and the row of each, any for others.

        All tokens are computed, since to know which are new a host would wait for its GPU.
        """
        rows = ids - self.first
        is_new = (rows >= 0) & (rows < len(self.trainable_tokens_delta))
        return is_new[:, None].to(device), rows.clamp(0, len(self.trainable_tokens_delta) - 1).to(device)


@dataclass(frozen=True)
class VocabularyRows:
    """The rows of new tokens in a decoder; embedding and head have the same ones where they are tied."""

    embedding: NewTokenRows
    head: NewTokenRows
