"""The native engine compared with a plain PEFT training loop, and with itself after interruptions."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.killed_training import kill_after, start
from support.reference_training import plain_loop

from kolotune.engines import events
from kolotune.engines.events import StepDone, TrainingEvent, TrainingNote, event_in
from kolotune.engines.job import TrainJob
from kolotune.engines.native import checkpointer, training
from kolotune.engines.native.checkpointer import TENSORS
from kolotune.engines.native.model import PackedModel
from kolotune.engines.native.trainer import Trainer
from kolotune.engines.prepared_tokens import PreparedTokens
from kolotune.foundation.errors import ConfigError, TrainingError
from kolotune.runners import child_process

MakeTraining = Callable[..., Any]


def losses(job: TrainJob, key: str = "loss") -> dict[int, float]:
    """Return the losses by step, from the metrics file."""
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), "a step appears twice"
    return dict(found)


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the same losses as PEFT and transformers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_curve_equals_that_of_a_plain_loop(kind: str, accumulation: int, make_training: MakeTraining) -> None:
    # 10 steps per epoch; the last one is smaller.
    folder = make_training(kind, chats=20 * accumulation - 1)
    job = folder.job(epochs=2, gradient_accumulation=accumulation)
    initial = folder.job("initial", epochs=0, gradient_accumulation=accumulation)
    training.train(initial)
    training.train(job)
    curve, weights = plain_loop(job, Path(initial.adapter))
    ours = list(losses(job).values())
    assert len(ours) == len(curve) == 20
    assert ours[0] - min(ours) > 0.5, "nothing was learnt, so the comparison proves nothing"
    assert ours == pytest.approx(curve, abs=1e-4)
    assert weights.keys() == adapter(job).keys()
    for name, tensor in adapter(job).items():
        # AdamW takes steps as large as the learning rate (5e-3) even where gradients are mere rounding errors.
        torch.testing.assert_close(tensor, weights[name], atol=2e-3, rtol=1e-3)


def test_the_learning_rate_follows_the_schedule(make_training: MakeTraining) -> None:
    job = make_training().job(epochs=4, scheduler_type="linear", warmup_steps=5)
    training.train(job)
    rates = list(losses(job, "learning_rate").values())
    assert rates == pytest.approx([5e-3 * (step / 5 if step < 5 else (20 - step) / 15) for step in range(20)])


def test_accumulation_is_the_same_as_a_larger_batch(make_training: MakeTraining) -> None:
    folder = make_training(chats=11)
    jobs = [
        folder.job("once", batch_size=6, gradient_accumulation=1),
        folder.job("thrice", batch_size=2, gradient_accumulation=3),
    ]
    for job in jobs:
        training.train(job)
    assert list(losses(jobs[0]).values()) == pytest.approx(list(losses(jobs[1]).values()), abs=1e-4)


# --- resuming


CHATS = {"chats": 10, "held_out": 4}
# 3 epochs of 5 steps, a checkpoint every second step and at each epoch's end, the best one kept.
JOB = {"epochs": 3, "lora_dropout": 0.1, "checkpoint_steps": 2, "early_stopping": 9}


class _Stop(Exception):
    pass


def train_until(job: TrainJob, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and crash after step `step`, before its checkpoint is written."""

    def emit(event: TrainingEvent) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(events, "emit", emit)
        with pytest.raises(_Stop):
            training.train(job)


@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_interrupted_at_any_step_gives_the_same_bits(
    every: int, make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_training(**CHATS)
    options = {**JOB, "checkpoint_steps": every}
    whole = folder.job("whole", **options)
    training.train(whole)
    saved = [step for step in range(1, 16) if step % every == 0 or step % 5 == 0]
    for step in range(1, 16):
        broken = folder.job(f"broken-{step}", **options)
        train_until(broken, step, monkeypatch)
        assert not Path(broken.adapter).exists()
        torch.manual_seed(step)
        capsys.readouterr()
        training.train(dataclasses.replace(broken, resume=True))
        before = max([each for each in saved if each < step], default=0)
        assert (f"resuming from step {before}" in capsys.readouterr().out) == bool(before)
        assert same(adapter(broken), adapter(whole))
        assert losses(broken) == losses(whole) and len(losses(broken)) == 15
        assert losses(broken, "held_out_loss") == losses(whole, "held_out_loss")
        assert list(losses(broken, "held_out_loss")) == [0, 5, 10, 15]


def test_killed_twice_gives_the_same_bits(make_training: MakeTraining) -> None:
    folder = make_training(**CHATS)
    whole, broken = folder.job("whole", **JOB), folder.job("broken", **JOB)
    training.train(whole)
    for step in (4, 11):
        kill_after(dataclasses.replace(broken, resume=True), step)
    last = start(dataclasses.replace(broken, resume=True))
    output, _ = last.communicate(timeout=120)
    assert last.returncode == 0
    notes = [event.text for event in map(event_in, output.splitlines()) if isinstance(event, TrainingNote)]
    assert any("resuming" in text for text in notes)
    assert same(adapter(broken), adapter(whole))
    assert losses(broken) == losses(whole)
    assert losses(broken, "held_out_loss") == losses(whole, "held_out_loss")


@pytest.mark.parametrize(("kind", "name"), [("tensors", TENSORS), ("facts", "state.json")])
def test_a_damaged_newest_checkpoint_costs_steps_only(
    kind: str,
    name: str,
    make_training: MakeTraining,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = make_training(**CHATS)
    whole, broken = folder.job("whole", **JOB), folder.job("broken", **JOB)
    training.train(whole)
    train_until(broken, 7, monkeypatch)
    file = Path(broken.checkpoints) / "step-00000006" / name
    file.write_bytes(file.read_bytes()[:-20])
    capsys.readouterr()
    training.train(dataclasses.replace(broken, resume=True))
    assert "resuming from step 5" in capsys.readouterr().out
    assert same(adapter(broken), adapter(whole)) and losses(broken) == losses(whole)


def test_more_epochs_after_the_end(make_training: MakeTraining) -> None:
    folder = make_training(**CHATS)
    # With these options the learning rate does not depend on the number of epochs.
    options = {**JOB, "scheduler_type": "constant", "warmup_steps": 2}
    long, short = folder.job("long", **options), folder.job("short", **{**options, "epochs": 1})
    training.train(long)
    training.train(short)
    assert not same(adapter(short), adapter(long))
    training.train(dataclasses.replace(short, epochs=3, resume=True))
    assert same(adapter(short), adapter(long))
    assert losses(short) == losses(long)


def test_resuming_at_the_end_changes_nothing(make_training: MakeTraining) -> None:
    job = make_training(**CHATS).job(**JOB)
    training.train(job)
    before, curve = adapter(job), losses(job)
    training.train(dataclasses.replace(job, resume=True))
    assert same(adapter(job), before) and losses(job) == curve


def test_fewer_epochs_than_already_done_are_refused(make_training: MakeTraining) -> None:
    job = make_training(**CHATS).job(**JOB)
    training.train(job)
    with pytest.raises(TrainingError, match="step 15"):
        training.train(dataclasses.replace(job, epochs=1, resume=True))


def test_other_settings_are_refused_and_nothing_is_lost(make_training: MakeTraining) -> None:
    job = make_training(**CHATS).job(**JOB)
    training.train(job)
    with pytest.raises(TrainingError, match="learning_rate, lora_rank"):
        training.train(dataclasses.replace(job, resume=True, lora_rank=2, learning_rate=1.0))
    assert checkpointer.newest(job) is not None


def test_without_resume_a_training_starts_from_scratch(make_training: MakeTraining) -> None:
    job = make_training(**CHATS).job(**JOB)
    training.train(job)
    before = adapter(job)
    training.train(job)
    assert same(adapter(job), before) and len(losses(job)) == 15
    training.train(dataclasses.replace(job, seed=8, epochs=1))
    assert not same(adapter(job), before) and len(losses(job)) == 5


# --- what goes wrong


def test_a_learning_rate_that_is_too_high_keeps_the_state_before(make_training: MakeTraining) -> None:
    job = make_training(chats=20).job(learning_rate=1e30, warmup_steps=2, scheduler_type="constant", max_grad_norm=0.0)
    with pytest.raises(TrainingError, match="not finite") as caught:
        training.train(job)
    assert "--learning-rate" in caught.value.hint
    state = checkpointer.newest(job)
    assert state is not None and f"at step {state.step + 1} " in caught.value.cause
    assert list(losses(job)) == list(range(1, state.step + 1))
    assert not Path(job.adapter).exists()


def test_the_kept_state_is_from_before_the_failing_step(
    make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing step must not change weights, optimizer or random numbers."""
    folder = make_training(**CHATS)
    options = {**JOB, "checkpoint_steps": 3}
    clean, poisoned = folder.job("clean", **options), folder.job("poisoned", **options)
    train_until(clean, 4, monkeypatch)
    wanted = checkpointer.newest(clean)
    original = PackedModel.backward
    steps = []

    def backward(model: PackedModel, tokens: PreparedTokens, indices: Any, factor: float) -> float:
        steps.append(1)
        return original(model, tokens, indices, factor) * (float("nan") if len(steps) == 4 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(PackedModel, "backward", backward)
        with pytest.raises(TrainingError, match="at step 4 "):
            training.train(poisoned)
    kept = checkpointer.newest(poisoned)
    assert kept is not None and wanted is not None
    assert kept.step == wanted.step == 3
    assert same(kept.tensors, wanted.tensors)


def test_weights_with_nan_stop_the_training(make_training: MakeTraining) -> None:
    folder = make_training()
    file = folder.root / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    job = folder.job()
    child = start(job)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == TrainingError.exit_code
    errors = [event for line in output.splitlines() if (event := child_process.event_in(line)) and event[0] == "error"]
    assert errors[0][1]["kind"] == "TrainingError" and "at step 1 " in str(errors[0][1]["cause"])
    assert not Path(job.adapter).exists()


def test_a_base_that_can_not_be_loaded(make_training: MakeTraining) -> None:
    folder = make_training()
    (folder.root / "base" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(TrainingError, match="base model"):
        training.train(folder.job())


def test_unknown_targets(make_training: MakeTraining) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        training.train(make_training().job(target_modules=["nonsense"]))


# --- options


def test_target_modules_by_name(make_training: MakeTraining) -> None:
    job = make_training().job(target_modules=["q_proj", "v_proj"], epochs=1)
    training.train(job)
    assert {name.split(".")[-3] for name in adapter(job)} == {"q_proj", "v_proj"}


def test_no_epochs_leave_the_base_unchanged(make_training: MakeTraining) -> None:
    job = make_training(held_out=2).job(epochs=0)
    training.train(job)
    tensors = adapter(job)
    assert tensors and not any(each.any() for name, each in tensors.items() if "lora_B" in name)
    assert losses(job) == {} and list(losses(job, "held_out_loss")) == [0]


def test_bf16(make_training: MakeTraining) -> None:
    folder = make_training(chats=20)
    job, exact = folder.job("bf16", dtype="bf16"), folder.job("fp32")
    training.train(job)
    training.train(exact)
    curve = list(losses(job).values())
    assert curve == pytest.approx(list(losses(exact).values()), rel=0.1)
    assert curve != list(losses(exact).values())
    assert all(each.dtype is torch.float32 for each in adapter(job).values())


def unlearnable(count: int) -> list[tuple[list[int], list[int]]]:
    """Return chats that contradict `random_chats`: each token is its predecessor minus 5."""
    return [([(seed * 7 - 5 * at) % 96 for at in range(12)], [0] + [1] * 11) for seed in range(count)]


def test_early_stopping_keeps_the_best_adapter(make_training: MakeTraining) -> None:
    folder = make_training(held_out=unlearnable(4))
    job = folder.job(epochs=8, early_stopping=2, learning_rate=1e-2)
    training.train(job)
    held_out = losses(job, "held_out_loss")
    best = min(held_out, key=lambda step: held_out[step])
    assert len(held_out) == best // 5 + 3 < 9, "it stops two evaluations after the best one"
    wanted = folder.job("wanted", epochs=8, learning_rate=1e-2)
    fresh = Trainer(wanted)
    checkpoint = checkpointer.newest(job)
    assert checkpoint is not None
    # The adapter is that of the best held-out loss, not of the last.
    from kolotune.engines.native import lora

    lora.load_tensors(fresh.adapters, adapter(job))
    fresh.model.updated()
    assert fresh.evaluate() == pytest.approx(held_out[best], rel=1e-6)
    lora.load_tensors(fresh.adapters, checkpoint.tensors)
    fresh.model.updated()
    assert fresh.evaluate() == pytest.approx(held_out[max(held_out)], rel=1e-6)
    assert held_out[max(held_out)] > held_out[best]
    # A stopped training stays stopped.
    before = adapter(job)
    training.train(dataclasses.replace(job, resume=True))
    assert losses(job, "held_out_loss") == held_out and same(adapter(job), before)


def test_without_early_stopping_the_last_adapter_is_written(make_training: MakeTraining) -> None:
    folder = make_training(held_out=unlearnable(4))
    job = folder.job(epochs=3, learning_rate=1e-2, early_stopping=9)
    training.train(job)
    last = folder.job("last", epochs=3, learning_rate=1e-2)
    training.train(last)
    assert losses(job) == losses(last) and not same(adapter(job), adapter(last))
    # The option may change when training resumes.
    training.train(dataclasses.replace(job, early_stopping=0, resume=True))
    assert same(adapter(job), adapter(last))


def test_chats_without_labels_have_no_loss(make_training: MakeTraining) -> None:
    """The first token of a chat can't be predicted; a batch with no other labels must not fail."""
    chats = [([5, 6, 7], [1, 0, 0]), ([8, 9], [1, 0])]
    job = make_training(chats=chats).job(epochs=1)
    training.train(job)
    assert list(losses(job).values()) == [0.0]


def test_metrics_have_all_fields(make_training: MakeTraining) -> None:
    job = make_training(held_out=2).job(epochs=1)
    training.train(job)
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    wanted = {"step", "epoch", "loss", "learning_rate", "tokens_per_second", "memory_mb", "time"}
    assert all(set(line) == wanted for line in steps)
    assert [line["epoch"] for line in steps] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_the_batch_size_does_not_change_the_held_out_loss(make_training: MakeTraining) -> None:
    """The held-out loss is the mean over the tokens in the loss mask, whatever the batch size."""
    folder = make_training(held_out=7)
    means = []
    for size in (1, 3, 7):
        trainer = Trainer(folder.job(f"size{size}", batch_size=size))
        means.append(trainer.evaluate())
    tokens = trainer.held_out
    assert tokens is not None
    sums = [(float(trainer.model.loss(tokens, [index])), tokens.sequence(index)[1]) for index in range(7)]
    wanted = sum(loss for loss, _ in sums) / sum(int((labels[1:] != -100).sum()) for _, labels in sums)
    assert means == pytest.approx([wanted] * 3, rel=1e-5)
