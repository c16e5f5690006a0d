"""Weights of labels: the gradients and losses of a training are those of the weighted mean, computed plainly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.reference_training import held_out_loss, plain_loop, weights_of
from support.training import branching_chats, random_chats
from torch.nn.functional import cross_entropy

from kolotune.chats.dataset.prepare import prepare_chats
from kolotune.engines.native import training
from kolotune.engines.native.model import PackedModel, TrainingModel, TransformersModel
from kolotune.engines.native.trainer import Trainer
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation import config as configs
from kolotune.run_folder.metrics import held_out_losses, read_metrics

MakeTraining = Callable[..., Any]


def weighted(chats: list[Any], seed: int = 1) -> list[Any]:
    """Return chats, of one sequence or of several, with a weight for each labelled run or none."""
    generator = torch.Generator().manual_seed(seed)

    def weigh(sequence: tuple[list[int], list[int]]) -> tuple[list[int], list[float]]:
        weight = [0.0, 0.25, 1.0, 0.1][int(torch.randint(4, (), generator=generator))]
        return sequence[0], [weight * label for label in sequence[1]]

    return [[weigh(each) for each in chat] if isinstance(chat, list) else weigh(chat) for chat in chats]


def reference(model: TransformersModel, tokens: PreparedTokens) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the weighted mean loss of all chats and its gradients, one sequence at a time, by autograd."""
    total, weight = torch.zeros(()), 0.0
    for number in range(len(tokens.offsets) - 1):
        (ids, labels), weights = tokens.sequence(number), weights_of(tokens, number)
        losses = cross_entropy(model.model(input_ids=ids[None]).logits[0, :-1], labels[1:], reduction="none")
        total = total + (losses * weights[1:]).sum()
        weight += float(weights[1:].sum())
    loss = total / weight
    loss.backward()
    return float(loss.detach()), gradients(model)


def gradients(model: TrainingModel) -> dict[str, torch.Tensor]:
    parts = {name: (pair.lora_A.grad, pair.lora_B.grad) for name, pair in model.adapters.items()}
    return {f"{name} {at}": part.clone() for name, pair in parts.items() for at, part in enumerate(pair)}


def models(job: Any) -> tuple[TransformersModel, list[TrainingModel]]:
    """Return a model for the reference, and those that train, all with the same adapters."""
    plain, packed, other = TransformersModel(job, "cpu"), PackedModel(job), TransformersModel(job, "cpu")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, pair in plain.adapters.items():
            pair.lora_B.normal_(std=0.05)
            for model in (packed, other):
                assert torch.equal(pair.lora_A, model.adapters[name].lora_A)
                model.adapters[name].lora_B.copy_(pair.lora_B)
    packed.updated()
    return plain, [packed, other]


def require_equal(job: Any) -> None:
    tokens = PreparedTokens.load(Path(job.data) / "train.safetensors")
    assert tokens.weights is not None
    plain, trained = models(job)
    loss, wanted = reference(plain, tokens)
    everything = range(len(tokens))
    weight = sum(tokens.label_weight(index) for index in everything)
    for model in trained:
        found = (
            sum(float(model.backward(tokens, group, 1 / weight)) for group in model.groups(tokens, everything)) / weight
        )
        assert found == pytest.approx(loss, abs=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)
        evaluated = sum(float(model.loss(tokens, group)) for group in model.groups(tokens, everything)) / weight
        assert evaluated == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("chats", [random_chats(9, 1), branching_chats(7, 3, system=12)], ids=["whole", "branching"])
def test_gradients_equal_those_of_a_plain_weighted_mean(
    chats: list[Any], compiled: bool, make_training: MakeTraining
) -> None:
    require_equal(make_training(chats=weighted(chats)).job(compile=compiled))


def test_weights_change_the_gradients(make_training: MakeTraining) -> None:
    """Weights that are all the same change nothing; others do."""
    chats = random_chats(6, 4)
    halves = [(ids, [0.5 * label for label in labels]) for ids, labels in chats]
    results = []
    for name, each in (("full", chats), ("half", halves), ("mixed", weighted(chats, 3))):
        trainer = Trainer(make_training(chats=each).job(name))
        results.append((trainer.step(range(len(trainer.tokens)), 1e-3), gradients(trainer.model)))
    full, half, mixed = results
    assert half[0] == pytest.approx(full[0], abs=1e-6)
    assert all(torch.allclose(half[1][name], gradient, atol=1e-6) for name, gradient in full[1].items())
    assert not all(torch.allclose(mixed[1][name], gradient, atol=1e-4) for name, gradient in full[1].items())


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_training_equals_a_plain_loop(kind: str, make_training: MakeTraining) -> None:
    folder = make_training(kind, chats=weighted(branching_chats(9, 1), 2), held_out=weighted(branching_chats(4, 2), 5))
    job, initial = folder.job(epochs=2, batch_size=3), folder.job("initial", epochs=0)
    training.train(initial)
    training.train(job)
    curve, _ = plain_loop(job, Path(initial.adapter))
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(curve, abs=1e-5)
    wanted = held_out_loss(folder.root / "base", Path(job.adapter), Path(job.data))
    assert held_out_losses(read_metrics(Path(job.metrics)))[-1][1] == pytest.approx(wanted, rel=1e-4)


def test_masked_and_weighted_chats_from_file_to_gradient(
    tiny_base: Path, tmp_path: Path, make_training: MakeTraining
) -> None:
    """A file of chats, prepared with a real tokenizer, gives the gradients of its authors' weights."""
    flags: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"weight": 0}, {"weight": 0.3}),
        ({"train": False}, {}),
        ({"loss_weight": 0.5}, {"masked": True}),
        ({}, {}),
    ]
    records = [
        {"messages": [
            {"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "one", **first},
            {"role": "user", "content": "more"}, {"role": "assistant", "content": f"two {number}", **second},
        ]}
        for number, (first, second) in enumerate(flags)
    ]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (tmp_path / "prepared").mkdir()
    values = {"train_data": [tmp_path / "chats.jsonl"], "eval_split": 0.0}
    prepare_chats(configs.resolve((values, "test", tmp_path)), tiny_base, tmp_path / "prepared", processes=1)
    job = make_training(chats=2).job(base_model=str(tiny_base), data=str(tmp_path / "prepared"))
    tokens = PreparedTokens.load(tmp_path / "prepared" / "train.safetensors")
    runs = [sorted(set(weights_of(tokens, number).tolist())) for number in range(4)]
    assert [pytest.approx(each) for each in ([0, 0.3], [0, 1], [0, 0.5], [0, 1])] == runs
    require_equal(job)
