"""torchtune on tiny Llamas, compared with a plain loop of PEFT, and with itself after interruptions."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reference_training import held_out_loss, plain_loop
from support.training import random_chats

from kolotune.engines.job import TrainJob
from kolotune.engines.torchtune import driver
from kolotune.engines.torchtune.environment import ensure
from kolotune.foundation.errors import ConfigError, TrainingError
from kolotune.runners.watchdog import WATCH_STDIN

Room = Callable[..., Any]
PLANTED = "planted-value-8d1f"


@pytest.fixture(scope="module", autouse=True)
def in_its_environment() -> None:
    """Installed once, in the user's cache."""
    ensure(print)


def losses(job: TrainJob, key: str = "loss") -> dict[int, float]:
    """Read step → loss from the metrics file."""
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), "a step stands there twice"
    return dict(found)


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the same as PEFT and transformers


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {"chats": 11, "batch_size": 2, "gradient_accumulation": 3, "weight_decay": 0.1}),
        (False, {"chats": 7, "batch_size": 3, "gradient_accumulation": 1, "max_grad_norm": 0.3}),
    ],
)
def test_it_computes_what_a_plain_loop_computes(tied: bool, options: dict[str, Any], training_room: Room) -> None:
    """Every chat counts (neither 11 nor 7 fill the steps), and PEFT reads the adapter as torchtune means it."""
    chats = options.pop("chats")
    room = training_room("llama", chats=chats, held_out=3, tie_word_embeddings=tied)
    initial, job = room.job("initial", epochs=0, **options), room.job(epochs=3, **options)
    driver.train(initial)
    driver.train(job)
    curve, weights = plain_loop(job, Path(initial.adapter))
    ours = list(losses(job).values())
    assert len(ours) == len(curve) == 3 * -(-chats // (job.batch_size * job.gradient_accumulation))
    assert max(ours) - min(ours) > 0.3, "it must have learnt something, or the comparison says nothing"
    assert ours == pytest.approx(curve, abs=1e-4)
    assert weights.keys() == adapter(job).keys()
    for name, tensor in adapter(job).items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-3, rtol=1e-3)
    told = losses(job, "held_out_loss")
    assert list(told) == [0, *(len(ours) // 3 * epoch for epoch in (1, 2, 3))]
    judged = held_out_loss(Path(job.base_model), Path(job.adapter), Path(job.data))
    assert told[len(ours)] == pytest.approx(judged, rel=1e-5)


def test_the_head_in_bf16_and_the_base_in_4_bits(training_room: Room) -> None:
    room = training_room("llama", held_out=3, hidden_size=128, intermediate_size=128, num_key_value_heads=4)
    targets = ["q_proj", "k_proj", "lm_head"]
    job = room.job(dtype="bf16", load_in_4bit=True, target_modules=targets)
    driver.train(job)
    config = json.loads((Path(job.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(targets)
    found = adapter(job)
    assert {name.split(".")[-3] for name in found} == set(targets)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert any(tensor.abs().max() > 0 for name, tensor in found.items() if "lm_head.lora_B" in name)
    used = (Path(job.checkpoints).parent / "torchtune" / "torchtune.yaml").read_text(encoding="utf-8")
    assert "quantize_base: true" in used and "dtype: bf16" in used


# --- resuming


def test_it_resumes_bit_for_bit(training_room: Room) -> None:
    """Adapter, optimizer, schedule and random numbers continue; torchtune 0.6.1 itself restarts the schedule."""
    room = training_room("llama", held_out=2)
    whole = room.job("whole", epochs=3, lora_dropout=0.2)
    driver.train(whole)
    cut = room.job("cut", epochs=3, lora_dropout=0.2, resume=True)
    kept = sorted(Path(whole.checkpoints).iterdir())
    assert [path.name for path in kept] == ["epoch-000002", "epoch-000003"]
    shutil.copytree(kept[0], Path(cut.checkpoints) / kept[0].name)
    shutil.copyfile(whole.metrics, cut.metrics)
    driver.train(cut)
    assert same(adapter(cut), adapter(whole))
    for key in ("loss", "learning_rate", "held_out_loss"):
        assert losses(cut, key) == losses(whole, key)
    before = Path(cut.metrics).read_text(encoding="utf-8")
    shutil.rmtree(cut.adapter)
    driver.train(cut)  # nothing is left to train
    assert same(adapter(cut), adapter(whole)) and Path(cut.metrics).read_text(encoding="utf-8") == before


def test_half_the_chats_at_once_make_the_same_steps_and_are_repeated_to_the_bit(
    training_room: Room, capfd: pytest.CaptureFixture[str]
) -> None:
    room = training_room("llama", chats=11, held_out=3)
    options = {"epochs": 3, "batch_size": 5, "lora_dropout": 0.0}
    whole, halved = room.job("whole", **options), room.job("halved", **options, halvings=[0, 3])
    driver.train(whole)
    driver.train(halved)
    assert list(losses(halved).values()) == pytest.approx(list(losses(whole).values()), abs=1e-5)
    assert losses(halved, "held_out_loss")[9] == pytest.approx(losses(whole, "held_out_loss")[9], abs=1e-5)
    # Memory ran out in the third epoch, of three steps; dropout's draws for smaller batches are others.
    options["lora_dropout"] = 0.2
    undisturbed, cut = room.job("undisturbed", **options), room.job("cut", **options, resume=True, halvings=[0])
    driver.train(undisturbed)
    shutil.copytree(Path(undisturbed.checkpoints) / "epoch-000002", Path(cut.checkpoints) / "epoch-000002")
    shutil.copyfile(undisturbed.metrics, cut.metrics)
    capfd.readouterr()
    driver.train(cut)
    assert '"begins", "step": 6, "halvings": [6]' in capfd.readouterr().out
    told = room.job("told", **options, halvings=[6])
    driver.train(told)
    assert same(adapter(told), adapter(cut)) and losses(told) == losses(cut)
    assert {step: loss for step, loss in losses(told).items() if step <= 6}.items() <= losses(undisturbed).items()
    assert not same(adapter(told), adapter(undisturbed))
    shutil.rmtree(cut.adapter)
    shutil.rmtree(Path(cut.checkpoints) / "epoch-000003")
    driver.train(dataclasses.replace(cut, halvings=[]))  # the checkpoint of the second epoch knows of none
    assert same(adapter(cut), adapter(undisturbed))


@pytest.mark.parametrize(
    ("changes", "reason"), [({"seed": 8, "lora_rank": 2}, "lora_rank, seed"), ({"epochs": 0}, "at epoch 1")]
)
def test_checkpoints_of_other_trainings_are_refused(changes: dict[str, Any], reason: str, training_room: Room) -> None:
    job = training_room("llama", chats=4).job(epochs=1)
    driver.train(job)
    with pytest.raises(TrainingError, match=reason):
        driver.train(dataclasses.replace(job, resume=True, **changes))


# --- killed, and what it sees of us


@pytest.fixture
def running_driver(
    training_room: Room, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TrainJob, subprocess.Popen[str]]]:
    """A long training in a separate process, in which torchtune is already at work."""
    monkeypatch.setenv("HF_TOKEN", f"hf_{PLANTED}")
    job = training_room("llama", chats=40, held_out=2).job(epochs=400, lora_dropout=0.1, batch_size=4)
    job.write(Path(job.metrics).with_name("job.json"))
    argv = [sys.executable, "-m", "kolotune.engines.torchtune", str(Path(job.metrics).with_name("job.json"))]
    env = {**os.environ, WATCH_STDIN: "1"}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    while not (Path(job.checkpoints) / "epoch-000002").exists():
        assert process.stdout.readline(), "the driver ended"
    yield job, process
    process.kill()
    process.wait()
    process.stdout.close()


def gone(process: psutil.Process) -> bool:
    """Return whether a process ends within some seconds; a zombie has ended."""
    for _ in range(100):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("how", ["killed", "asked to stop", "its parent is gone"])
def test_torchtune_ends_with_its_driver_and_the_run_is_finished_later(
    how: str, running_driver: tuple[TrainJob, subprocess.Popen[str]]
) -> None:
    job, process = running_driver
    (child,) = psutil.Process(process.pid).children()
    assert "kolotune_recipe" in child.cmdline()
    assert "HF_TOKEN" not in child.environ() and PLANTED not in str(child.environ()) + str(child.cmdline())
    if how == "its parent is gone":
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
    assert process.wait(20) == (-signal.SIGKILL if how == "killed" else 130)
    assert gone(child)
    done = max(int(path.name[-6:]) for path in Path(job.checkpoints).glob("epoch-*"))
    driver.train(dataclasses.replace(job, epochs=done + 1, resume=True))
    assert max(losses(job)) == (done + 1) * 10 and Path(job.adapter).is_dir()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_killed_again_and_again_it_ends_with_the_same_adapter(training_room: Room) -> None:
    """After SIGKILLs at random moments, of driver or recipe, adapter and metrics equal those of an undisturbed run."""
    room = training_room("llama", held_out=2)
    options = {"epochs": 60, "lora_dropout": 0.2, "batch_size": 2}
    whole, job = room.job("whole", **options), room.job("cut", **options, resume=True)
    driver.train(whole)
    job.write(Path(job.metrics).with_name("job.json"))
    dice, kills, going_on = random.Random(5), 0, set()
    while kills < 12:
        argv = [sys.executable, "-m", "kolotune.engines.torchtune", str(Path(job.metrics).with_name("job.json"))]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        steps_left = dice.randint(1, 60)
        for line in process.stdout:
            if "resuming from" in line:
                going_on.add(line)
            steps_left -= '"step"' in line
            if steps_left == 0:
                time.sleep(dice.random() * 0.05)
                children = psutil.Process(process.pid).children()
                victim = children[0] if children and kills % 2 else psutil.Process(process.pid)
                victim.send_signal(signal.SIGKILL)
                kills += 1
                assert all(gone(child) for child in children)
        if process.wait() == 0:
            break
    else:
        driver.train(job)
    assert kills >= 5 and len(going_on) >= 3
    assert same(adapter(job), adapter(whole))
    for key in ("loss", "held_out_loss"):
        assert losses(job, key) == losses(whole, key)


# --- hostile text, errors


def test_names_come_through_literally(
    training_room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchtune's config would read the environment for `${oc.env:…}`, and import what `_component_` names."""
    monkeypatch.setenv("PLANTED", PLANTED)
    hostile = "a ${oc.env:PLANTED} 'b' _component_=os.system ${output_dir}"
    room = training_room("llama", chats=4, held_out=2)
    root = tmp_path / hostile
    root.mkdir()
    for name in ("base", "data"):
        (tmp_path / name).rename(root / name)
    job = dataclasses.replace(
        room.job(epochs=1),
        base_model=str(root / "base"),
        base_name=hostile,
        data=str(root / "data"),
        **{name: str(root / "run" / name) for name in ("adapter", "checkpoints", "metrics")},
    )
    driver.train(job)
    config = json.loads((Path(job.adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == hostile
    used = (root / "run" / "torchtune" / "torchtune.yaml").read_text(encoding="utf-8")
    assert "oc.env" not in used and "os.system" not in used
    assert PLANTED not in capfd.readouterr().out
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or PLANTED.encode() not in path.read_bytes(), path


def test_a_loss_that_is_not_finite_stops_the_training(training_room: Room) -> None:
    room = training_room("llama", chats=4)
    file = Path(room.root, "base", "model.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    job = room.job()
    with pytest.raises(TrainingError, match="not finite at step 1") as raised:
        driver.train(job)
    assert "--learning-rate" in raised.value.hint
    assert not Path(job.adapter).exists() and not losses(job)


def test_out_of_memory_is_reported(training_room: Room) -> None:
    # torchtune keeps the rotary embedding of every position: 10**13 of them are terabytes.
    room = training_room("llama", chats=4, max_position_embeddings=10**13)
    with pytest.raises(MemoryError, match="allocate memory"):
        driver.train(room.job())


def test_another_error_names_the_log(training_room: Room) -> None:
    room = training_room("llama", chats=4)
    file = Path(room.root, "base", "model.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="torchtune stopped: ") as raised:
        driver.train(room.job())
    log = Path(raised.value.hint.removeprefix("See ").removesuffix("."))
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_what_it_cannot_do_is_refused_before_work(training_room: Room) -> None:
    job = training_room("llama", chats=4).job(scheduler_type="linear")
    with pytest.raises(ConfigError, match="cosine"):
        driver.train(job)
    assert not Path(job.metrics).exists() and not Path(job.checkpoints).exists()


def test_differences_are_reported(training_room: Room, capfd: pytest.CaptureFixture[str]) -> None:
    room = training_room("llama", chats=random_chats(6, 3))
    job = room.job(epochs=1, warmup_steps=100, checkpoint_steps=2)
    driver.train(job)
    assert list(losses(job, "learning_rate").values()) == pytest.approx([5e-3 * step / 100 for step in range(3)])
    said = capfd.readouterr().out
    assert "the warmup of 100 steps is longer than the training (3 steps)" in said
    assert "checkpoint after each epoch only" in said
