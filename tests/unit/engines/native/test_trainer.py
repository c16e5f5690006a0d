"""Trainings on chats whose answers are sequences of their own: as a plain loop, resumed, by several processes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.reference_training import held_out_loss, plain_loop
from support.training import branching_chats

from kolotune.engines import events
from kolotune.engines.events import StepDone, TrainingEvent, TrainingResult
from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.engines.native.trainer import Trainer
from kolotune.run_folder.metrics import held_out_losses, read_metrics
from kolotune.runners import child_process

MakeTraining = Callable[..., Any]
CHATS = {"chats": branching_chats(13, 1), "held_out": branching_chats(4, 2)}
OPTIONS = {"epochs": 3, "batch_size": 3, "checkpoint_steps": 2}


class _Stop(Exception):
    pass


def losses(job: TrainJob) -> list[float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def held_out(job: TrainJob) -> list[float]:
    return [loss for _, loss in held_out_losses(read_metrics(Path(job.metrics)))]


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_losses_equal_those_of_a_plain_loop(kind: str, make_training: MakeTraining) -> None:
    """A step has as many chats as for others: in the packed step (Llama) and with transformers (Gemma)."""
    folder = make_training(kind, **CHATS)
    job, initial = folder.job(**OPTIONS), folder.job("initial", epochs=0)
    training.train(initial)
    training.train(job)
    curve, _ = plain_loop(job, Path(initial.adapter))
    assert len(curve) == 3 * 5 and curve[0] - min(curve) > 0.2
    assert losses(job) == pytest.approx(curve, abs=1e-4)
    wanted = held_out_loss(folder.root / "base", Path(job.adapter), Path(job.data))
    assert held_out(job)[-1] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("size", [1, 13])
def test_the_batch_size_does_not_change_the_held_out_loss(size: int, make_training: MakeTraining) -> None:
    folder = make_training(**CHATS)
    wanted = Trainer(folder.job("three", batch_size=3)).evaluate()
    assert Trainer(folder.job("other", batch_size=size)).evaluate() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_interrupted_gives_the_same_bits(
    dropout: float, make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_training(**CHATS)
    whole, broken = (folder.job(name, lora_dropout=dropout, **OPTIONS) for name in ("whole", "broken"))
    training.train(whole)

    def emit(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == 7:
            raise _Stop

    with monkeypatch.context() as patch, pytest.raises(_Stop):
        patch.setattr(events, "emit", emit)
        training.train(broken)
    training.train(dataclasses.replace(broken, resume=True))
    assert losses(broken) == losses(whole) and held_out(broken) == held_out(whole)
    ours, theirs = adapter(broken), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("sharded", [False, True])
def test_several_processes_give_the_same_losses(sharded: bool, make_training: MakeTraining) -> None:
    """A sharded base needs the same number of passes in each process, however many sequences its chats have."""
    folder = make_training(**CHATS)
    options = {**OPTIONS, "epochs": 2}
    alone, together = folder.job("alone", **options), folder.job("together", nproc=2, sharded=sharded, **options)
    training.train(alone)
    file = folder.root / "job.json"
    together.write(file)
    log = folder.root / "log"
    results: list[TrainingResult] = []

    def on_line(name: str, fields: Any) -> None:
        event = events.parse_event(name, fields)
        if isinstance(event, TrainingResult):
            results.append(event)

    assert child_process.run("kolotune.engines.native", str(file), log=log, otherwise=Exception, on_event=on_line) == 0
    assert results[0].processes == 2
    assert losses(together) == pytest.approx(losses(alone), abs=1e-4)
    assert held_out(together) == pytest.approx(held_out(alone), rel=1e-3)
