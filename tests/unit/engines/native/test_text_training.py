"""Trainings on packed documents: each is computed by itself, and a training that is killed resumes to the same bits."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.killed_training import kill_after
from support.reference_training import held_out_loss, plain_loop
from support.training import VOCABULARY, LabelledIds

from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.run_folder.metrics import read_metrics

MakeTraining = Callable[..., Any]
_BEGIN = 1


def packed_documents(count: int, seed: int) -> list[list[LabelledIds]]:
    """Return packed sequences of random documents, which all begin with one token, and some with the same words."""
    dice = random.Random(seed)
    common = [dice.randrange(3, VOCABULARY) for _ in range(9)]

    def document() -> LabelledIds:
        start = [_BEGIN, *common[: dice.choice([0, 0, 9])]]
        ids = [*start, *(dice.randrange(3, VOCABULARY) for _ in range(dice.randint(1, 30)))]
        return ids, [0, *[1] * (len(ids) - 1)]

    return [[document() for _ in range(dice.randint(1, 4))] for _ in range(count)]


CHATS = {"chats": packed_documents(9, 1), "held_out": packed_documents(3, 2)}
OPTIONS = {"epochs": 3, "batch_size": 2, "checkpoint_steps": 2, "lora_dropout": 0.0}


def losses(job: TrainJob, key: str = "loss") -> list[float]:
    values = [getattr(line, key) for line in read_metrics(Path(job.metrics))]
    return [value for value in values if value is not None]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_losses_are_those_of_documents_computed_one_by_one(kind: str, make_training: MakeTraining) -> None:
    """No document sees another, and each has its own positions: a plain loop computes each as a row of its own."""
    folder = make_training(kind, **CHATS)
    job, initial = folder.job(**OPTIONS), folder.job("initial", epochs=0)
    training.train(initial)
    training.train(job)
    curve, _ = plain_loop(job, Path(initial.adapter))
    assert len(curve) == 15 and curve[0] - min(curve) > 0.05
    assert losses(job) == pytest.approx(curve, abs=1e-4)
    wanted = held_out_loss(folder.root / "base", Path(job.adapter), Path(job.data))
    assert losses(job, "held_out_loss")[-1] == pytest.approx(wanted, rel=1e-4)


def test_killed_twice_gives_the_same_bits(make_training: MakeTraining) -> None:
    folder = make_training(**CHATS)
    whole, broken = (folder.job(name, **OPTIONS) for name in ("whole", "broken"))
    training.train(whole)
    for step in (4, 11):
        kill_after(dataclasses.replace(broken, resume=True), step)
    training.train(dataclasses.replace(broken, resume=True))
    one, other = (load_file(Path(job.adapter) / "adapter_model.safetensors") for job in (broken, whole))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(broken) == losses(whole) and losses(broken, "held_out_loss") == losses(whole, "held_out_loss")
