"""The hand-written training step and transformers' autograd side by side."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from kolotune.engines.job import TrainJob
from kolotune.engines.native import lora
from kolotune.engines.native.model import PackedModel, TrainingModel, TransformersModel
from kolotune.engines.native.operations import Operations
from kolotune.engines.prepared_tokens import PreparedTokens


def chats_of(seed: int, count: int, prefix: int, longest: int) -> list[tuple[list[int], list[int]]]:
    """Return random chats that share a prefix of `prefix` tokens, with labels at random positions."""
    dice = random.Random(seed)
    shared = [dice.randrange(96) for _ in range(prefix)]
    chats = []
    for _ in range(count):
        own = [dice.randrange(96) for _ in range(dice.randint(3, longest))]
        labels = [0] * (prefix + 1) + [int(dice.random() < 0.6) for _ in own[1:]]
        chats.append((shared + own, labels))
    return chats


def pair_of(job: TrainJob, operations: Operations | None = None) -> tuple[PackedModel, TransformersModel]:
    """Return both implementations of one model, with the same nonzero adapters."""
    packed, plain = PackedModel(job, operations=operations), TransformersModel(job, "cpu")
    assert list(packed.adapters) == list(plain.adapters)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, pair in packed.adapters.items():
            assert torch.equal(pair.lora_A, plain.adapters[name].lora_A), "both start from the same random numbers"
            pair.lora_B.normal_(std=0.05)
            if lora.MAGNITUDE in lora.parts_of(pair):
                getattr(pair, lora.MAGNITUDE).mul_(torch.rand(len(pair.lora_B)) + 0.5)
            for part in lora.parts_of(pair):
                getattr(plain.adapters[name], part).copy_(getattr(pair, part))
    packed.updated()
    return packed, plain


def gradients(
    model: TrainingModel, tokens: PreparedTokens, indices: range, factor: float
) -> tuple[float, dict[str, Any]]:
    loss = float(sum(model.backward(tokens, group, factor) for group in model.groups(tokens, indices)))
    found = {}
    for name, pair in model.adapters.items():
        found |= {f"{name} {part}": getattr(pair, part).grad for part in lora.parts_of(pair)}
    return loss, found


def compare(job: TrainJob, packed: PackedModel, plain: TransformersModel, share: bool = True) -> None:
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    everything = range(len(tokens))
    labels = max(1, sum(tokens.label_count(index) for index in everything))
    loss, wanted = gradients(plain, tokens, everything, 1 / labels)
    packed._shares = share
    found_loss, found = gradients(packed, tokens, everything, 1 / labels)
    assert found_loss / labels == pytest.approx(loss / labels, abs=1e-5)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=2e-5 * scale + 1e-9, rtol=1e-4, msg=name)
    evaluated = float(sum(packed.loss(tokens, group) for group in packed.groups(tokens, everything)))
    assert evaluated / labels == pytest.approx(loss / labels, abs=1e-5)


def check_recomputing(job: TrainJob) -> None:
    """Check that recomputing activations changes no bit of losses and gradients, nor the random numbers after them."""
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    results = []
    for recompute in (False, True):
        model, _ = pair_of(job)
        model._recomputes = lambda packed, wanted=recompute: wanted  # type: ignore[method-assign, misc]
        torch.manual_seed(9)
        loss, found = gradients(model, tokens, range(len(tokens)), 0.1)
        results.append((loss, {**found, "next draw": torch.rand(3)}))
    (kept_loss, kept), (loss, found) = results
    assert loss == kept_loss
    assert all(torch.equal(kept[name], each) for name, each in found.items())
