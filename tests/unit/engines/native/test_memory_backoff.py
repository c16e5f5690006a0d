"""Out-of-memory backoff: smaller micro-batches give the same steps, and a repeated run gives the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import losses

from kolotune.engines.job import TrainJob
from kolotune.engines.native import checkpointer, model, training
from kolotune.engines.native.memory_errors import is_out_of_memory
from kolotune.engines.native.trainer import Trainer

MakeTraining = Callable[..., Any]
JOB = {"epochs": 2, "batch_size": 4, "checkpoint_steps": 2}


def curve(job: TrainJob) -> list[float]:
    return list(losses(Path(job.metrics)).values())


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


@pytest.mark.parametrize("model_kind", ["packed", "plain"])
def test_smaller_micro_batches_give_the_same_step(
    model_kind: str, make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model_kind == "plain":
        monkeypatch.setattr(model.supported_models, "reason_unsupported", lambda *_: "this test")
    folder = make_training(chats=12, held_out=3)
    whole = folder.job("whole", **JOB)
    training.train(whole)
    for halvings in ([0], [2], [1, 1], [0, 3]):
        job = folder.job("".join(map(str, halvings)), **JOB, halvings=halvings)
        training.train(job)
        assert curve(job) == pytest.approx(curve(whole), abs=1e-5)
        assert losses(Path(job.metrics), "held_out_loss")[6] == pytest.approx(
            losses(Path(whole.metrics), "held_out_loss")[6], abs=1e-5
        )


@pytest.mark.parametrize("model_kind", ["packed", "plain"])
def test_backoff_halves_the_micro_batch(
    model_kind: str, make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model_kind == "plain":
        monkeypatch.setattr(model.supported_models, "reason_unsupported", lambda *_: "this test")
    trainer = Trainer(make_training(chats=8).job(batch_size=8))
    largest = []
    for trainer.model.backoffs in range(4):
        groups = trainer.model.groups(trainer.tokens, range(8))
        assert sorted(index for group in groups for index in group) == list(range(8))
        largest.append(max(map(len, groups)))
    assert largest == [8, 4, 2, 1]


def test_backoff_is_reproduced_bit_for_bit(make_training: MakeTraining) -> None:
    """Resuming after an out-of-memory error equals a run that knew the step beforehand, also with dropout."""
    folder = make_training(chats=12, held_out=3)
    options = {**JOB, "lora_dropout": 0.1}
    halved, known = (folder.job(name, **options) for name in ("halved", "known"))
    training.train(dataclasses.replace(halved, epochs=1))
    state = checkpointer.newest(halved)
    assert state is not None and state.step == 3 and state.halvings == []
    training.train(dataclasses.replace(halved, resume=True, halvings=[0]))
    state = checkpointer.newest(halved)
    assert state is not None and state.halvings == [3]
    training.train(dataclasses.replace(known, epochs=1))  # one epoch first: the learning rate decays as in `halved`
    training.train(dataclasses.replace(known, resume=True, halvings=[3]))
    assert curve(known) == curve(halved)
    assert adapter(known).keys() == adapter(halved).keys()
    assert all(torch.equal(tensor, adapter(halved)[name]) for name, tensor in adapter(known).items())
    # Once it is in the checkpoint, it applies whatever the job says.
    training.train(dataclasses.replace(halved, resume=True, epochs=3, halvings=[]))
    state = checkpointer.newest(halved)
    assert state is not None and state.halvings == [3]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("shapes can't be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_pytorchs_own_cpu_error_means_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
