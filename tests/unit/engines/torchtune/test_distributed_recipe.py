"""torchtune's distributed recipe: several processes make the steps of one, and any number can resume."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kolotune.engines.job import TrainJob
from kolotune.engines.torchtune import driver
from kolotune.engines.torchtune.environment import ensure
from kolotune.foundation.errors import TrainingError
from kolotune.runners.watchdog import WATCH_STDIN

Room = Callable[..., Any]
OPTIONS = {
    "learning_rate": 2e-2,
    "batch_size": 3,
    "gradient_accumulation": 2,
    "max_grad_norm": 0.0,
    "weight_decay": 0.1,
}


@pytest.fixture(scope="module", autouse=True)
def in_its_environment() -> None:
    """Installed once, in the user's cache."""
    ensure(print)


def figures(job: TrainJob, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), "a step stands there twice"
    return [each for _, each in found]


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def same(one: TrainJob, other: TrainJob) -> bool:
    ours, theirs = adapter(one), adapter(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def options_of(job: TrainJob) -> dict[str, Any]:
    """The settings of a job, without its paths."""
    places = ("adapter", "checkpoints", "metrics")
    return {name: each for name, each in dataclasses.asdict(job).items() if name not in places}


def goes_on(room: Any, job: TrainJob, name: str, **options: Any) -> TrainJob:
    """A job that resumes from the second to last checkpoint of the finished `job`."""
    other: TrainJob = room.job(name, **{**options_of(job), "resume": True, **options})
    before = sorted(Path(job.checkpoints).iterdir())[-2]
    shutil.copytree(before, Path(other.checkpoints) / before.name)
    shutil.copyfile(job.metrics, other.metrics)
    return other


def agree(job: TrainJob, alone: TrainJob) -> None:
    assert figures(job) == pytest.approx(figures(alone), rel=1e-3)
    assert figures(job, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=1e-3)
    assert figures(job, "learning_rate") == figures(alone, "learning_rate")
    assert figures(alone)[0] - min(figures(alone)) > 0.3, "it must have learnt something"


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_make_the_steps_of_one_and_one_resumes_theirs(
    tied: bool, training_room: Room, capfd: Any
) -> None:
    """11 chats make no whole steps; a share of 6 is a batch for each."""
    room = training_room("llama", chats=11, held_out=5, tie_word_embeddings=tied)
    targets = ["all-linear"] if tied else ["q_proj", "lm_head"]
    alone = room.job("alone", epochs=2, target_modules=targets, **OPTIONS)
    two = room.job("two", **{**options_of(alone), "nproc": 2})
    driver.train(alone)
    capfd.readouterr()
    driver.train(two)
    told = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [each["step"] for each in told if each["event"] == "step"] == [1, 2, 3, 4], "one process tells"
    assert told[-1]["processes"] == 2
    agree(two, alone)
    states = [load_file(Path(each.checkpoints) / "epoch-000001" / "state.safetensors") for each in (alone, two)]
    assert states[0].keys() == states[1].keys() and any("|exp_avg" in name for name in states[0])
    for name, tensor in states[0].items():
        if not name.startswith("random"):  # sums of gradients too: AdamW's steps alone don't tell how long they are
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-6)
    one_goes_on = goes_on(room, two, "one-goes-on", nproc=1)
    driver.train(one_goes_on)
    agree(one_goes_on, alone)


@pytest.mark.slow
def test_two_processes_resume_one_and_two(training_room: Room) -> None:
    room = training_room("llama", chats=11, held_out=5)
    alone = room.job("alone", epochs=2, **OPTIONS)
    driver.train(alone)
    two_go_on = goes_on(room, alone, "two-go-on", nproc=2)
    driver.train(two_go_on)
    agree(two_go_on, alone)
    two = room.job("two", epochs=3, nproc=2, lora_dropout=0.2, **OPTIONS)
    driver.train(two)
    again = goes_on(room, two, "again")
    driver.train(again)
    assert same(again, two) and figures(again) == figures(two), "bit for bit, with dropout too"


@pytest.mark.slow
def test_more_processes_than_chats_and_halved_batches(training_room: Room) -> None:
    room = training_room("llama", chats=5, held_out=2)
    for options in ({"batch_size": 2}, {"batch_size": 4, "gradient_accumulation": 2, "max_grad_norm": 0.3}):
        name = str(options["batch_size"])
        alone = room.job(f"alone-{name}", epochs=3, **options)
        three = room.job(f"three-{name}", epochs=3, nproc=3, halvings=[1], **options)
        driver.train(alone)
        driver.train(three)
        assert figures(three) == pytest.approx(figures(alone), rel=1e-3)
        assert figures(three, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=1e-3)


@pytest.mark.slow
def test_a_4_bit_base_is_sharded(training_room: Room) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}
    room = training_room("llama", chats=11, held_out=5, **sizes)
    alone = room.job("alone", dtype="bf16", load_in_4bit=True, **OPTIONS)
    two = room.job("two", dtype="bf16", load_in_4bit=True, nproc=2, **OPTIONS)
    driver.train(alone)
    driver.train(two)
    assert figures(two) == pytest.approx(figures(alone), rel=0.01)
    assert figures(two, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=0.01)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_processes(training_room: Room) -> None:
    room = training_room("llama", chats=6)
    job = room.job(nproc=2, learning_rate=1.0, warmup_steps=0, weight_decay=0.0, epochs=1, max_grad_norm=0.0)
    from safetensors.torch import save_file

    file = Path(room.root, "base", "model.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="not finite at step 1"):
        driver.train(job)
    assert not Path(job.adapter).exists()


@pytest.mark.slow
def test_out_of_memory_is_reported_without_a_restart(training_room: Room) -> None:
    # torchtune keeps the rotary embedding of every position: 10**13 of them are terabytes.
    room = training_room("llama", chats=4, max_position_embeddings=10**13)
    job = room.job(nproc=2)
    with pytest.raises(MemoryError, match="allocate memory"):
        driver.train(job)
    assert (Path(job.metrics).parent / "torchtune" / "torchtune.log").read_text().count("Traceback") <= 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("how", ["a process is killed", "the driver is killed", "its parent is gone"])
def test_a_lost_process_costs_an_epoch_at_most(how: str, training_room: Room) -> None:
    """No process outlives the driver."""
    room = training_room("llama", chats=12, held_out=2)
    job = room.job("run", nproc=2, epochs=30, lora_dropout=0.1, batch_size=4)
    job.write(Path(job.metrics).with_name("job.json"))
    argv = [sys.executable, "-m", "kolotune.engines.torchtune", str(Path(job.metrics).with_name("job.json"))]
    env = {**os.environ, WATCH_STDIN: "1"}
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stdin is not None
    while not (Path(job.checkpoints) / "epoch-000002").exists():
        assert process.stdout.readline(), "the driver ended"
    (starter,) = psutil.Process(process.pid).children()
    workers = starter.children()
    assert len(workers) == 2
    if how == "a process is killed":
        workers[1].send_signal(signal.SIGKILL)
        output = process.stdout.read()  # its standard input stays open: that is how it knows that we live
        assert process.wait() == 0 and "resuming from step" in output
        whole = room.job("whole", **{**options_of(job), "nproc": 2})
        driver.train(whole)
        assert same(job, whole) and figures(job) == figures(whole)
        return
    if how == "the driver is killed":
        process.kill()
    else:
        process.stdin.close()
    process.wait(30)
    deadline = time.monotonic() + 30
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in (starter, *workers)):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.1)
