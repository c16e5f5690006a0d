"""torchtune's distributed recipe: several processes give the steps of one, and any number can resume."""

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

MakeTraining = Callable[..., Any]
OPTIONS = {
    "learning_rate": 2e-2,
    "batch_size": 3,
    "gradient_accumulation": 2,
    "max_grad_norm": 0.0,
    "weight_decay": 0.1,
}


@pytest.fixture(scope="module", autouse=True)
def torchtune_environment() -> None:
    """Install torchtune's environment in the user's cache, unless it is there."""
    ensure(print)


def figures(job: TrainJob, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line[key]) for line in lines if key in line]
    assert len(dict(found)) == len(found), "a step appears twice"
    return [each for _, each in found]


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def same(one: TrainJob, other: TrainJob) -> bool:
    ours, theirs = adapter(one), adapter(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def options_of(job: TrainJob) -> dict[str, Any]:
    """Return the settings of a job, without its paths."""
    paths = ("adapter", "checkpoints", "metrics")
    return {name: each for name, each in dataclasses.asdict(job).items() if name not in paths}


def resumed_job(folder: Any, job: TrainJob, name: str, **options: Any) -> TrainJob:
    """Return a job that resumes from the second to last checkpoint of the finished `job`."""
    other: TrainJob = folder.job(name, **{**options_of(job), "resume": True, **options})
    before = sorted(Path(job.checkpoints).iterdir())[-2]
    shutil.copytree(before, Path(other.checkpoints) / before.name)
    shutil.copyfile(job.metrics, other.metrics)
    return other


def assert_same_figures(job: TrainJob, alone: TrainJob) -> None:
    assert figures(job) == pytest.approx(figures(alone), rel=1e-3)
    assert figures(job, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=1e-3)
    assert figures(job, "learning_rate") == figures(alone, "learning_rate")
    assert figures(alone)[0] - min(figures(alone)) > 0.3, "nothing was learnt, so the comparison proves nothing"


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_processes_give_the_steps_of_one_and_one_resumes_theirs(
    tied: bool, make_training: MakeTraining, capfd: Any
) -> None:
    """11 chats do not fill the last step; each process takes 3 of the 6 chats of a full step."""
    folder = make_training("llama", chats=11, held_out=5, tie_word_embeddings=tied)
    targets = ["all-linear"] if tied else ["q_proj", "lm_head"]
    alone = folder.job("alone", epochs=2, target_modules=targets, **OPTIONS)
    two = folder.job("two", **{**options_of(alone), "nproc": 2})
    driver.train(alone)
    capfd.readouterr()
    driver.train(two)
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [each["step"] for each in events if each["event"] == "step"] == [1, 2, 3, 4], (
        "only one process reports steps"
    )
    assert events[-1]["processes"] == 2
    assert_same_figures(two, alone)
    states = [load_file(Path(each.checkpoints) / "epoch-000001" / "state.safetensors") for each in (alone, two)]
    assert states[0].keys() == states[1].keys() and any("|exp_avg" in name for name in states[0])
    for name, tensor in states[0].items():
        if not name.startswith("random"):  # moments too: AdamW's steps do not depend on the size of the gradients
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-6)
    resumed_by_one = resumed_job(folder, two, "resumed-by-one", nproc=1)
    driver.train(resumed_by_one)
    assert_same_figures(resumed_by_one, alone)


@pytest.mark.slow
def test_two_processes_resume_one_and_two(make_training: MakeTraining) -> None:
    folder = make_training("llama", chats=11, held_out=5)
    alone = folder.job("alone", epochs=2, **OPTIONS)
    driver.train(alone)
    resumed_by_two = resumed_job(folder, alone, "resumed-by-two", nproc=2)
    driver.train(resumed_by_two)
    assert_same_figures(resumed_by_two, alone)
    two = folder.job("two", epochs=3, nproc=2, lora_dropout=0.2, **OPTIONS)
    driver.train(two)
    resumed = resumed_job(folder, two, "resumed")
    driver.train(resumed)
    assert same(resumed, two) and figures(resumed) == figures(two), "bit for bit, also with dropout"


@pytest.mark.slow
def test_more_processes_than_chats_and_halved_batches(make_training: MakeTraining) -> None:
    folder = make_training("llama", chats=5, held_out=2)
    for options in ({"batch_size": 2}, {"batch_size": 4, "gradient_accumulation": 2, "max_grad_norm": 0.3}):
        name = str(options["batch_size"])
        alone = folder.job(f"alone-{name}", epochs=3, **options)
        three = folder.job(f"three-{name}", epochs=3, nproc=3, halvings=[1], **options)
        driver.train(alone)
        driver.train(three)
        assert figures(three) == pytest.approx(figures(alone), rel=1e-3)
        assert figures(three, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=1e-3)


@pytest.mark.slow
def test_a_4_bit_base_is_sharded(make_training: MakeTraining) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 4}
    folder = make_training("llama", chats=11, held_out=5, **sizes)
    alone = folder.job("alone", dtype="bf16", load_in_4bit=True, **OPTIONS)
    two = folder.job("two", dtype="bf16", load_in_4bit=True, nproc=2, **OPTIONS)
    driver.train(alone)
    driver.train(two)
    assert figures(two) == pytest.approx(figures(alone), rel=0.01)
    assert figures(two, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=0.01)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_processes(make_training: MakeTraining) -> None:
    folder = make_training("llama", chats=6)
    job = folder.job(nproc=2, learning_rate=1.0, warmup_steps=0, weight_decay=0.0, epochs=1, max_grad_norm=0.0)
    from safetensors.torch import save_file

    file = Path(folder.root, "base", "model.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="not finite at step 1"):
        driver.train(job)
    assert not Path(job.adapter).exists()


@pytest.mark.slow
def test_out_of_memory_is_reported_without_a_restart(make_training: MakeTraining) -> None:
    # torchtune stores the rotary embedding of every position: terabytes for 10**13 positions.
    folder = make_training("llama", chats=4, max_position_embeddings=10**13)
    job = folder.job(nproc=2)
    with pytest.raises(MemoryError, match="allocate memory"):
        driver.train(job)
    assert (Path(job.metrics).parent / "torchtune" / "torchtune.log").read_text().count("Traceback") <= 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("how", ["a process is killed", "the driver is killed", "its parent ends"])
def test_a_lost_process_costs_an_epoch_at_most(how: str, make_training: MakeTraining) -> None:
    """An epoch is repeated at most, and no process outlives the driver."""
    folder = make_training("llama", chats=12, held_out=2)
    job = folder.job("run", nproc=2, epochs=30, lora_dropout=0.1, batch_size=4)
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
        output = process.stdout.read()  # standard input stays open: when it closes, the driver stops
        assert process.wait() == 0 and "resuming from step" in output
        whole = folder.job("whole", **{**options_of(job), "nproc": 2})
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
        assert time.monotonic() < deadline, "a process is still running"
        time.sleep(0.1)
