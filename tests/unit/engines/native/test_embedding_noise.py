"""NEFTune's noise is that of transformers' own hook, in the packed step and beside transformers' models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed_models import gradients, pair_of
from support.training import random_chats
from transformers.integrations.neftune import activate_neftune

from kolotune.engines.native.embedding_noise import packed_noise
from kolotune.engines.native.model import PackedModel, TransformersModel
from kolotune.engines.prepared_tokens import PreparedTokens

MakeTraining = Callable[..., Any]
ALPHA = 5.0
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "an embedding that scales": ("gemma", {}),
    "scaled behind the embedding": ("granite", {"embedding_multiplier": 6.0}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_those_of_transformers_hook(
    kind: str, make_training: MakeTraining, compiled: bool
) -> None:
    """Each chat ends with a label, so that transformers' length is ours."""
    name, more = MODELS[kind]
    folder = make_training(name, chats=random_chats(3, 2), **more)
    packed, plain = pair_of(folder.job(neftune_noise_alpha=ALPHA, compile=compiled))
    _, hooked = pair_of(folder.job())
    _, silent = pair_of(folder.job())
    activate_neftune(hooked.model, ALPHA)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    for chat in range(3):
        results = []
        for model in (hooked, packed, plain, silent):
            torch.manual_seed(40 + chat)
            results.append(gradients(model, tokens, range(chat, chat + 1), 0.1))
        (wanted, wanted_gradients), *ours, (without, _) = results
        assert abs(wanted - without) > 1e-3, "the noise changes something"
        for loss, found in ours:
            assert loss == pytest.approx(wanted, abs=1e-4)
            for name, gradient in wanted_gradients.items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(found[name], gradient, atol=3e-5 * scale + 1e-9, rtol=1e-3, msg=name)


@pytest.mark.parametrize("model", [PackedModel, lambda job: TransformersModel(job, "cpu")])
def test_evaluation_has_no_noise(model: Callable[[Any], Any], make_training: MakeTraining) -> None:
    folder = make_training(chats=random_chats(4, 3))
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    noisy, silent = model(folder.job(neftune_noise_alpha=ALPHA)), model(folder.job())
    assert noisy.loss(tokens, range(4)) == silent.loss(tokens, range(4))
    assert noisy.backward(tokens, range(4), 1.0) != silent.backward(tokens, range(4), 1.0)
    assert noisy.loss(tokens, range(4)) == silent.loss(tokens, range(4))


def test_each_sequence_has_the_noise_of_its_length() -> None:
    torch.manual_seed(0)
    noise = packed_noise([3, 399], 64, ALPHA, torch.device("cpu"))
    assert noise.shape == (402, 64)
    for part, length in ((noise[:3], 4), (noise[3:], 400)):
        limit = ALPHA / math.sqrt(length * 64)
        assert 0.9 * limit < float(part.abs().max()) <= limit
        assert abs(float(part.mean())) < 0.2 * limit


def test_padded_sequences_have_the_noise_of_their_lengths(make_training: MakeTraining) -> None:
    """The second sequence has tokens behind its only label."""
    chats = [([5] * 30, [0] + [1] * 29), ([6] * 30, [0] * 8 + [1] + [0] * 21)]
    folder = make_training(chats=chats)
    model = TransformersModel(folder.job(neftune_noise_alpha=ALPHA), "cpu")
    seen = []
    model.model.get_input_embeddings().register_forward_hook(lambda module, ids, output: seen.append(output.detach()))  # type: ignore[operator]
    tokens = PreparedTokens.load(Path(folder.root / "data" / "train.safetensors"))
    model.backward(tokens, [0, 1], 1.0)
    model.loss(tokens, [0, 1])
    noise = seen[0] - seen[1]
    for row, length in ((0, 30), (1, 9)):
        limit = ALPHA / math.sqrt(length * noise.shape[-1])
        assert 0.9 * limit < float(noise[row].abs().max()) <= limit * 1.001


def test_chats_that_share_a_prefix_have_noise_of_their_own(make_training: MakeTraining) -> None:
    shared = [7] * 40
    chats = [([*shared, at, at + 3, at + 6], [0] * 41 + [1, 1]) for at in range(8)]
    folder = make_training(chats=chats)
    tokens = PreparedTokens.load(folder.root / "data" / "train.safetensors")
    costs = [PackedModel(folder.job(neftune_noise_alpha=alpha)).costs(tokens, range(8)) for alpha in (0.0, ALPHA)]
    assert sum(costs[1].values()) > 3 * sum(costs[0].values())
    loss = PackedModel(folder.job(neftune_noise_alpha=ALPHA)).backward(tokens, range(8), 1.0)
    assert torch.isfinite(loss)
