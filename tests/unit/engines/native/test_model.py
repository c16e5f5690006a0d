"""Training steps in transformers: activations are kept, or recomputed when memory is short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import TrainingFolder

from kolotune.engines.native.model import TransformersModel
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation import hardware


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_are_recomputed_when_memory_is_short(
    make_training: Callable[..., TrainingFolder], dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_training("llama", chats=4).job(lora_dropout=dropout)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    model: Any = TransformersModel(job, "cpu")

    def step(free: int, halvings: int = 0) -> tuple[float, torch.Tensor, bool]:
        monkeypatch.setattr(hardware, "free_memory", lambda: free)
        model.backoffs = halvings
        model.flat.parameter.grad.zero_()
        torch.manual_seed(5)
        loss = float(model.backward(tokens, [0, 1, 2], 0.5))
        return loss, model.flat.parameter.grad.clone(), model.model.is_gradient_checkpointing

    kept, recomputed, halved = step(1 << 34), step(1 << 10), step(1 << 34, halvings=1)
    assert [each[2] for each in (kept, recomputed, halved)] == [False, True, True]
    for each in (recomputed, halved):
        assert each[0] == kept[0] and torch.equal(each[1], kept[1]), "only the memory differs"
    assert step(1 << 34)[2] is False
