"""The hand-written training step computes the losses and gradients of transformers with autograd."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.packed_models import chats_of, check_recomputing, compare, pair_of
from support.training import branching_chats

from kolotune.engines.native import attention, sequence_packing
from kolotune.engines.native.model import PackedModel, TransformersModel, open_model
from kolotune.engines.native.sequence_packing import TOKEN_BUDGET, group_by_length, pack
from kolotune.engines.prepared_tokens import PreparedTokens

MakeTraining = Callable[..., Any]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama 3.2": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "stretched": ("llama", {"rope_parameters": LINEAR}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {}),
    "qwen 2": ("qwen2", {}),
    "qwen 3": ("qwen3", {}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("prefix", [0, 12])
def test_losses_and_gradients_equal_those_of_transformers(
    kind: str, prefix: int, make_training: MakeTraining, compiled: bool
) -> None:
    name, more = MODELS[kind]
    job = make_training(name, chats=chats_of(prefix, 7, prefix, 30), **more).job(compile=compiled)
    assert isinstance(open_model(job, "cpu", 100), PackedModel)
    compare(job, *pair_of(job))


@pytest.mark.parametrize("seed", range(8))
def test_random_batches(seed: int, make_training: MakeTraining, compiled: bool) -> None:
    """Vary prefixes, lengths, labels, ranks and targets at random, with and without prefix sharing."""
    dice = random.Random(seed)
    chats = chats_of(seed, dice.randint(1, 12), dice.choice([0, 3, 8, 40]), dice.choice([4, 60, 200]))
    targets = dice.choice([["all-linear"], ["q_proj", "v_proj"], ["down_proj"], ["o_proj", "up_proj", "k_proj"]])
    job = make_training(chats=chats).job(compile=compiled, lora_rank=dice.choice([1, 4, 40]), target_modules=targets)
    compare(job, *pair_of(job), share=dice.random() < 0.7)


def test_long_chats_take_the_other_attention(
    make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """Long chats share no prefix. The compiled attention handles all lengths alike."""
    job = make_training(chats=chats_of(3, 6, 10, 90)).job(compile=compiled)
    monkeypatch.setattr(sequence_packing, "LONG", 40)
    used = []
    forward = attention.LongAttention.forward
    monkeypatch.setattr(attention.LongAttention, "forward", lambda *given: used.append(1) or forward(*given))
    compare(job, *pair_of(job))
    assert bool(used) != compiled


@pytest.mark.parametrize("kind", ["llama", "qwen 3"])
@pytest.mark.parametrize("system", [0, 12])
def test_answers_as_sequences_of_their_own(kind: str, system: int, make_training: MakeTraining, compiled: bool) -> None:
    name, more = MODELS[kind]
    chats = branching_chats(8, 3, system=system, longest=30)
    job = make_training(name, chats=chats, **more).job(compile=compiled)
    packed, plain = pair_of(job)
    compare(job, packed, plain)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    sequences = pack(tokens, range(len(tokens)), share=True)
    assert sequences.has_branches and bool(sequences.prefix) == bool(system)
    assert len(sequences.ids) < len(pack(tokens, range(len(tokens)), share=False).ids) / 1.5
    compare(job, packed, plain, share=False)


def test_long_chats_with_branches(make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Long chats share no prefix with others, but their sequences do."""
    job = make_training(chats=branching_chats(4, 5, system=12, longest=40)).job(compile=compiled)
    monkeypatch.setattr(sequence_packing, "LONG", 60)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    packed = pack(tokens, range(4), share=True)
    assert packed.has_branches and not packed.prefix
    compare(job, *pair_of(job))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputing_activations_changes_no_bit(dropout: float, make_training: MakeTraining, compiled: bool) -> None:
    job = make_training(chats=chats_of(5, 6, 12, 40)).job(compile=compiled, lora_dropout=dropout)
    check_recomputing(job)


def test_dropout_has_the_right_mean_and_is_off_in_evaluation(make_training: MakeTraining) -> None:
    """Averaged over many masks, the loss is close to that without dropout; that of a single mask is not."""
    job = make_training(chats=chats_of(5, 4, 0, 20)).job(lora_dropout=0.3)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    model, _ = pair_of(job)
    exact = float(model.loss(tokens, range(4)))
    assert model.loss(tokens, range(4)) == exact
    draws = [float(model.backward(tokens, range(4), 0.0)) for _ in range(200)]
    assert len(set(draws)) > 190
    spread = torch.tensor(draws).std()
    assert abs(sum(draws) / 200 - exact) < 3 * spread


def test_dropout_gradients_match_a_finite_difference(make_training: MakeTraining, compiled: bool) -> None:
    """Take the finite difference along a random direction, with fixed random numbers."""
    job = make_training(chats=chats_of(5, 3, 0, 20)).job(compile=compiled, lora_dropout=0.3)
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    model, _ = pair_of(job)

    def loss() -> float:
        torch.manual_seed(4)
        model.updated()
        return float(model.backward(tokens, range(3), 1.0))

    loss()
    torch.manual_seed(2)
    slope, moved = 0.0, []
    for pair in model.adapters.values():
        for part in (pair.lora_A, pair.lora_B):
            direction = torch.randn_like(part)
            assert part.grad is not None
            slope += float((part.grad * direction).sum())
            moved.append((part, direction))
    step = 1e-4
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for part, direction in moved:
                part.add_(direction, alpha=sign * step)
        ends.append(loss())
        with torch.no_grad():
            for part, direction in moved:
                part.sub_(direction, alpha=sign * step)
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_bf16_stays_near_fp32(make_training: MakeTraining, compiled: bool) -> None:
    folder = make_training(chats=chats_of(6, 6, 12, 40))
    tokens = PreparedTokens.load(Path(folder.job(compile=compiled).data) / "train.safetensors")
    exact, _ = pair_of(folder.job(compile=compiled))
    rough, plain = pair_of(folder.job(dtype="bf16", compile=compiled))
    loss = float(exact.loss(tokens, range(6)))
    assert float(rough.loss(tokens, range(6))) == pytest.approx(loss, rel=0.02)
    assert float(plain.loss(tokens, range(6))) == pytest.approx(loss, rel=0.02)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_neox", "gpt2"])
def test_other_models_are_computed_by_transformers(kind: str, make_training: MakeTraining) -> None:
    folder = make_training(kind)
    model = open_model(folder.job(), "cpu", 100)
    assert isinstance(model, TransformersModel)
    tokens = PreparedTokens.load(Path(folder.job().data) / "train.safetensors")
    assert model.loss(tokens, [0]) > 0


def test_groups_hold_each_chat_once_within_the_budget(make_training: MakeTraining) -> None:
    job = make_training(chats=chats_of(7, 60, 5, 200)).job()
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    groups = group_by_length(tokens, range(60), share=True)
    assert sorted(index for group in groups for index in group) == list(range(60))
    sums = [sum(tokens.chat_length(index) for index in group) for group in groups]
    assert max(sums) <= TOKEN_BUDGET and min(sums[:-1]) > TOKEN_BUDGET // 2
    assert [len(group) for group in group_by_length(tokens, range(4), share=True, budget=10)] == [1, 1, 1, 1]


def test_a_shared_prefix_is_computed_once(make_training: MakeTraining) -> None:
    chats = chats_of(8, 5, 20, 10)
    job = make_training(chats=chats).job()
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    packed = pack(tokens, range(5), share=True)
    assert packed.prefix >= 20 and len(packed.ids) == packed.prefix + sum(packed.lengths)
    last_labels = [max(place for place, labelled in enumerate(labels) if labelled) for _, labels in chats]
    assert packed.lengths == tuple(last - packed.prefix for last in last_labels), "nothing behind is computed"
    assert packed.labels == sum(sum(labels[1:]) for _, labels in chats)
    pairs = [ids[at - 1 : at + 1] for ids, labels in chats for at in range(1, len(ids)) if labels[at]]
    assert torch.stack([packed.ids[packed.label_positions], packed.targets], 1).tolist() == pairs
    assert pack(tokens, [2], share=True).prefix == 0
    labelled = dataclasses.replace(tokens, labelled=torch.ones_like(tokens.labelled))
    assert pack(labelled, range(5), share=True).prefix == 0, "a label on the prefix is each chat's own"


def test_chats_without_labels_add_nothing(make_training: MakeTraining, compiled: bool) -> None:
    chats = [(ids, [0] * len(ids)) for ids, _ in chats_of(9, 3, 0, 10)]
    job = make_training(chats=chats).job(compile=compiled)
    tokens, model = PreparedTokens.load(Path(job.data) / "train.safetensors"), PackedModel(job)
    assert model.loss(tokens, range(3)) == 0.0 and model.backward(tokens, range(3), 1.0) == 0.0
    assert model.flat.parameter.grad is not None and not model.flat.parameter.grad.any()
