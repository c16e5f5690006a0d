"""NEFTune: noise on the embeddings while training.

Source: Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023. As in transformers, the noise is
on what the model's embedding returns. Tokens behind the last label do not count in a sequence's length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .transfers import to_device


def packed_noise(lengths: Sequence[int], width: int, alpha: float, device: torch.device) -> Tensor:
    """Return the noise of sequences that lie end to end, each without its last label, fp32 ``[tokens, width]``.

    Args:
        lengths: tokens of each sequence.
        width: numbers of a token.
        alpha: NEFTune's: the noise is uniform up to ``alpha / sqrt(length * width)``.
        device: of the result.
    """
    limits = _limits([length + 1 for length in lengths], width, alpha).repeat_interleave(torch.tensor(lengths))
    noise = torch.empty(len(limits), width, device=device).uniform_(-1, 1)
    return noise.mul_(to_device(limits, device)[:, None])


class PaddedNoise:
    """Adds noise to the embeddings of a model of transformers while it trains.

    Args:
        model: its embedding gets a hook.
        alpha: see `packed_noise`; 0 for no noise.

    Attributes:
        lengths: int64 ``[sequences]``, of the batch to come: the tokens of each up to its last label.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        self._alpha = alpha
        self.lengths = torch.zeros(0, dtype=torch.int64)
        if alpha:
            embedding: nn.Module = getattr(model, "get_input_embeddings")()  # noqa: B009 - of transformers' models
            embedding.register_forward_hook(self._add)

    def _add(self, module: nn.Module, _: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        limits = _limits(self.lengths.tolist(), output.shape[-1], self._alpha)
        noise = torch.empty(output.shape, device=output.device).uniform_(-1, 1)
        return output + noise.mul_(limits.to(output.device)[:, None, None]).to(output.dtype)


def _limits(lengths: Sequence[int], width: int, alpha: float) -> Tensor:
    return torch.tensor([alpha / math.sqrt(length * width) for length in lengths])
