"""torchtune on tiny Llamas, compared with a plain PEFT training loop, and with itself after interruptions."""

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

MakeTraining = Callable[..., Any]
PLANTED = "planted-value-8d1f"


@pytest.fixture(scope="module", autouse=True)
def torchtune_environment() -> None:
    """Install torchtune's environment in the user's cache, unless it is there."""
    ensure(print)


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


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {"chats": 11, "batch_size": 2, "gradient_accumulation": 3, "weight_decay": 0.1}),
        (False, {"chats": 7, "batch_size": 3, "gradient_accumulation": 1, "max_grad_norm": 0.3}),
    ],
)
def test_losses_and_weights_equal_those_of_a_plain_loop(
    tied: bool, options: dict[str, Any], make_training: MakeTraining
) -> None:
    """No chat is dropped, though 11 and 7 do not fill the last step, and PEFT reads the adapter correctly."""
    chats = options.pop("chats")
    folder = make_training("llama", chats=chats, held_out=3, tie_word_embeddings=tied)
    initial, job = folder.job("initial", epochs=0, **options), folder.job(epochs=3, **options)
    driver.train(initial)
    driver.train(job)
    curve, weights = plain_loop(job, Path(initial.adapter))
    ours = list(losses(job).values())
    assert len(ours) == len(curve) == 3 * -(-chats // (job.batch_size * job.gradient_accumulation))
    assert max(ours) - min(ours) > 0.3, "nothing was learnt, so the comparison proves nothing"
    assert ours == pytest.approx(curve, abs=1e-4)
    assert weights.keys() == adapter(job).keys()
    for name, tensor in adapter(job).items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-3, rtol=1e-3)
    evaluated = losses(job, "held_out_loss")
    assert list(evaluated) == [0, *(len(ours) // 3 * epoch for epoch in (1, 2, 3))]
    expected = held_out_loss(Path(job.base_model), Path(job.adapter), Path(job.data))
    assert evaluated[len(ours)] == pytest.approx(expected, rel=1e-5)


def test_the_head_in_bf16_and_the_base_in_4_bits(make_training: MakeTraining) -> None:
    folder = make_training("llama", held_out=3, hidden_size=128, intermediate_size=128, num_key_value_heads=4)
    targets = ["q_proj", "k_proj", "lm_head"]
    job = folder.job(dtype="bf16", load_in_4bit=True, target_modules=targets)
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


def test_it_resumes_bit_for_bit(make_training: MakeTraining) -> None:
    """Adapter, optimizer, schedule and random numbers continue; torchtune 0.6.1 itself restarts the schedule."""
    folder = make_training("llama", held_out=2)
    whole = folder.job("whole", epochs=3, lora_dropout=0.2)
    driver.train(whole)
    cut = folder.job("cut", epochs=3, lora_dropout=0.2, resume=True)
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


@pytest.mark.slow
def test_halved_micro_batches_give_the_same_steps_and_repeat_bit_for_bit(
    make_training: MakeTraining, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_training("llama", chats=11, held_out=3)
    options = {"epochs": 3, "batch_size": 5, "lora_dropout": 0.0}
    whole, halved = folder.job("whole", **options), folder.job("halved", **options, halvings=[0, 3])
    driver.train(whole)
    driver.train(halved)
    assert list(losses(halved).values()) == pytest.approx(list(losses(whole).values()), abs=1e-5)
    assert losses(halved, "held_out_loss")[9] == pytest.approx(losses(whole, "held_out_loss")[9], abs=1e-5)
    # Memory runs out in the third epoch, of three steps; smaller batches use different random numbers for dropout.
    options["lora_dropout"] = 0.2
    uninterrupted, cut = folder.job("uninterrupted", **options), folder.job("cut", **options, resume=True, halvings=[0])
    driver.train(uninterrupted)
    shutil.copytree(Path(uninterrupted.checkpoints) / "epoch-000002", Path(cut.checkpoints) / "epoch-000002")
    shutil.copyfile(uninterrupted.metrics, cut.metrics)
    capfd.readouterr()
    driver.train(cut)
    assert '"begins", "step": 6, "halvings": [6]' in capfd.readouterr().out
    known = folder.job("known", **options, halvings=[6])
    driver.train(known)
    assert same(adapter(known), adapter(cut)) and losses(known) == losses(cut)
    assert {step: loss for step, loss in losses(known).items() if step <= 6}.items() <= losses(uninterrupted).items()
    assert not same(adapter(known), adapter(uninterrupted))
    shutil.rmtree(cut.adapter)
    shutil.rmtree(Path(cut.checkpoints) / "epoch-000003")
    driver.train(dataclasses.replace(cut, halvings=[]))  # the checkpoint of the second epoch has no halvings
    assert same(adapter(cut), adapter(uninterrupted))


@pytest.mark.parametrize(
    ("changes", "reason"), [({"seed": 8, "lora_rank": 2}, "lora_rank, seed"), ({"epochs": 0}, "at epoch 1")]
)
def test_checkpoints_of_other_trainings_are_refused(
    changes: dict[str, Any], reason: str, make_training: MakeTraining
) -> None:
    job = make_training("llama", chats=4).job(epochs=1)
    driver.train(job)
    with pytest.raises(TrainingError, match=reason):
        driver.train(dataclasses.replace(job, resume=True, **changes))


# --- killed processes, and secrets in their environment


@pytest.fixture
def running_driver(
    make_training: MakeTraining, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[TrainJob, subprocess.Popen[str]]]:
    """Start a long training in a separate process, and wait until torchtune has trained two epochs."""
    monkeypatch.setenv("HF_TOKEN", f"hf_{PLANTED}")
    job = make_training("llama", chats=40, held_out=2).job(epochs=400, lora_dropout=0.1, batch_size=4)
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


def has_ended(process: psutil.Process) -> bool:
    """Return whether a process ends within ten seconds; a zombie counts as ended."""
    for _ in range(100):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("how", ["killed", "asked to stop", "its parent ends"])
def test_torchtune_ends_with_its_driver_and_the_run_can_be_finished(
    how: str, running_driver: tuple[TrainJob, subprocess.Popen[str]]
) -> None:
    job, process = running_driver
    (child,) = psutil.Process(process.pid).children()
    assert "kolotune_recipe" in child.cmdline()
    assert "HF_TOKEN" not in child.environ() and PLANTED not in str(child.environ()) + str(child.cmdline())
    if how == "its parent ends":
        assert process.stdin is not None
        process.stdin.close()
    else:
        process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGTERM)
    assert process.wait(20) == (-signal.SIGKILL if how == "killed" else 130)
    assert has_ended(child)
    done = max(int(path.name[-6:]) for path in Path(job.checkpoints).glob("epoch-*"))
    driver.train(dataclasses.replace(job, epochs=done + 1, resume=True))
    assert max(losses(job)) == (done + 1) * 10 and Path(job.adapter).is_dir()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_repeated_kills_give_the_same_adapter(make_training: MakeTraining) -> None:
    """After SIGKILLs of driver or recipe at random times, adapter and metrics equal those of an uninterrupted run."""
    folder = make_training("llama", held_out=2)
    options = {"epochs": 60, "lora_dropout": 0.2, "batch_size": 2}
    whole, job = folder.job("whole", **options), folder.job("cut", **options, resume=True)
    driver.train(whole)
    job.write(Path(job.metrics).with_name("job.json"))
    dice, kills, resumptions = random.Random(5), 0, set()
    while kills < 12:
        argv = [sys.executable, "-m", "kolotune.engines.torchtune", str(Path(job.metrics).with_name("job.json"))]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        steps_left = dice.randint(1, 60)
        for line in process.stdout:
            if "resuming from" in line:
                resumptions.add(line)
            steps_left -= '"step"' in line
            if steps_left == 0:
                time.sleep(dice.random() * 0.05)
                children = psutil.Process(process.pid).children()
                victim = children[0] if children and kills % 2 else psutil.Process(process.pid)
                victim.send_signal(signal.SIGKILL)
                kills += 1
                assert all(has_ended(child) for child in children)
        if process.wait() == 0:
            break
    else:
        driver.train(job)
    assert kills >= 5 and len(resumptions) >= 3
    assert same(adapter(job), adapter(whole))
    for key in ("loss", "held_out_loss"):
        assert losses(job, key) == losses(whole, key)


# --- hostile names, and errors


def test_hostile_names_are_kept_literally(
    make_training: MakeTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In its config, torchtune expands `${oc.env:…}` and imports what `_component_` names."""
    monkeypatch.setenv("PLANTED", PLANTED)
    hostile = "a ${oc.env:PLANTED} 'b' _component_=os.system ${output_dir}"
    folder = make_training("llama", chats=4, held_out=2)
    root = tmp_path / hostile
    root.mkdir()
    for name in ("base", "data"):
        (tmp_path / name).rename(root / name)
    job = dataclasses.replace(
        folder.job(epochs=1),
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


def test_a_loss_that_is_not_finite_stops_the_training(make_training: MakeTraining) -> None:
    folder = make_training("llama", chats=4)
    file = Path(folder.root, "base", "model.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    job = folder.job()
    with pytest.raises(TrainingError, match="not finite at step 1") as raised:
        driver.train(job)
    assert "--learning-rate" in raised.value.hint
    assert not Path(job.adapter).exists() and not losses(job)


def test_out_of_memory_is_reported(make_training: MakeTraining) -> None:
    # torchtune stores the rotary embedding of every position: terabytes for 10**13 positions.
    folder = make_training("llama", chats=4, max_position_embeddings=10**13)
    with pytest.raises(MemoryError, match="allocate memory"):
        driver.train(folder.job())


def test_another_error_names_the_log(make_training: MakeTraining) -> None:
    folder = make_training("llama", chats=4)
    file = Path(folder.root, "base", "model.safetensors")
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="torchtune stopped: ") as raised:
        driver.train(folder.job())
    log = Path(raised.value.hint.removeprefix("See ").removesuffix("."))
    assert "Traceback" in log.read_text(encoding="utf-8")


def test_an_unsupported_option_is_refused_before_training(make_training: MakeTraining) -> None:
    job = make_training("llama", chats=4).job(scheduler_type="linear")
    with pytest.raises(ConfigError, match="cosine"):
        driver.train(job)
    assert not Path(job.metrics).exists() and not Path(job.checkpoints).exists()


def test_ignored_options_are_reported(make_training: MakeTraining, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_training("llama", chats=random_chats(6, 3))
    job = folder.job(epochs=1, warmup_steps=100, checkpoint_steps=2)
    driver.train(job)
    assert list(losses(job, "learning_rate").values()) == pytest.approx([5e-3 * step / 100 for step in range(3)])
    output = capfd.readouterr().out
    assert "the warmup of 100 steps is longer than the training (3 steps)" in output
    assert "checkpoint after each epoch only" in output
