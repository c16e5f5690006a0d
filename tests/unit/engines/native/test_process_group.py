"""Several processes give the same result as one, also when a different number of them resumes."""

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

from kolotune.engines.events import StepDone, TrainingResult, event_in
from kolotune.engines.job import TrainJob
from kolotune.engines.native import launcher, training
from kolotune.engines.native.process_group import ProcessGroup
from kolotune.foundation import hardware

MakeTraining = Callable[..., Any]


def start(job: TrainJob) -> subprocess.Popen[str]:
    file = Path(job.metrics).parent / "job.json"
    job.write(file)
    argv = [sys.executable, "-m", "kolotune.engines.native", str(file)]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(job: TrainJob) -> dict[str, Any]:
    """Run the engine and return the facts of its result."""
    child = start(job)
    output, _ = child.communicate()
    assert child.returncode == 0, output
    events = map(event_in, output.splitlines())
    results = [event.facts() for event in events if isinstance(event, TrainingResult)]
    assert len(results) == 1, "only one process reports a result"
    return results[0]


def figures(job: TrainJob, key: str) -> list[float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    return [line[key] for line in lines if key in line]


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


@pytest.fixture
def folder(make_training: MakeTraining) -> Any:
    return make_training("llama", chats=37, held_out=7)


OPTIONS = {"batch_size": 6, "epochs": 3, "checkpoint_steps": 1}


@pytest.fixture
def alone(folder: Any) -> TrainJob:
    """Train in this process and return the job."""
    job: TrainJob = folder.job("alone", **OPTIONS)
    training.train(job)
    return job


@pytest.mark.slow
def test_variants_that_are_computed_from_the_base(folder: Any) -> None:
    """Magnitudes, and matrices that start as a part of the weights, are the first process's in all of them."""
    variant = {**OPTIONS, "epochs": 1, "learning_rate": 1e-3, "use_dora": True, "init_lora_weights": "pissa"}
    alone, two = folder.job("one", **variant), folder.job("two", nproc=2, **variant)
    training.train(alone)
    train(two)
    assert figures(two, "loss") == pytest.approx(figures(alone, "loss"), abs=1e-4)
    for name, tensor in adapter(two).items():
        torch.testing.assert_close(tensor, adapter(alone)[name], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_result_equals_that_of_one_process(processes: int, folder: Any, alone: TrainJob) -> None:
    job = folder.job(f"by-{processes}", nproc=processes, **OPTIONS)
    assert train(job)["processes"] == processes
    assert figures(job, "loss") == pytest.approx(figures(alone, "loss"), abs=1e-4)
    assert figures(job, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=1e-3)
    assert figures(alone, "loss")[0] - min(figures(alone, "loss")) > 0.5, "it must have learnt something"
    for name, tensor in adapter(job).items():
        torch.testing.assert_close(tensor, adapter(alone)[name], atol=2e-3, rtol=1e-3)


def test_a_killed_process_costs_one_checkpoint_interval_only(folder: Any) -> None:
    whole = folder.job("whole", nproc=2, lora_dropout=0.1, **OPTIONS)
    train(whole)
    job = dataclasses.replace(folder.job("killed", nproc=2, lora_dropout=0.1, **OPTIONS), epochs=whole.epochs)
    child = start(job)
    checkpoints = Path(job.checkpoints)
    deadline = time.monotonic() + 500
    while not list(checkpoints.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    workers = psutil.Process(child.pid).children()
    assert len(workers) == 2
    os.kill(workers[1].pid, signal.SIGKILL)
    output, _ = child.communicate()
    assert child.returncode == 0, output
    assert "resuming from step" in output
    assert figures(job, "loss") == figures(whole, "loss")
    ours, theirs = adapter(job), adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [event.step for event in map(event_in, output.splitlines()) if isinstance(event, StepDone)]
    assert len(steps) - len(set(steps)) <= 1, "steps that were computed twice"


@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_a_different_number_of_processes_resumes_within_an_epoch(
    first: int, then: int, folder: Any, alone: TrainJob
) -> None:
    job = folder.job(f"from-{first}", nproc=first, **OPTIONS)
    (train if first > 1 else training.train)(job)
    newest, before = sorted(Path(job.checkpoints).glob("step-*"), reverse=True)
    shutil.rmtree(newest)  # leaves a checkpoint within an epoch
    assert int(before.name[-2:]) % 7 == 6
    (train if then > 1 else training.train)(dataclasses.replace(job, nproc=then, resume=True))
    assert figures(job, "loss") == pytest.approx(figures(alone, "loss"), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma", marks=pytest.mark.slow)])
def test_a_sharded_base_gives_the_same_steps(kind: str, make_training: MakeTraining) -> None:
    folder = make_training(kind, chats=11, held_out=3)
    options = {"batch_size": 5, "epochs": 2, "gradient_accumulation": 2}
    alone, sharded = folder.job("alone", **options), folder.job("sharded", nproc=2, sharded=True, **options)
    training.train(alone)
    train(sharded)
    assert figures(sharded, "loss") == pytest.approx(figures(alone, "loss"), abs=1e-4)
    assert figures(sharded, "held_out_loss") == pytest.approx(figures(alone, "held_out_loss"), rel=1e-3)


@pytest.mark.parametrize(
    ("restarts", "before", "now", "expected"),
    [("1", "2", 3, True), ("1", "2", 2, False), ("0", "2", 3, False), ("2", "None", 3, False), ("1", "", 3, False)],
)
def test_a_restarted_process_knows_whether_memory_ran_out(
    restarts: str, before: str, now: int, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vmstat").write_text(f"oom_kill {now}\n")
    monkeypatch.setattr(hardware, "_own_counters", lambda: [tmp_path / "vmstat"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    monkeypatch.setenv(launcher._KILLS_BEFORE, before)
    assert launcher.was_restarted_for_memory() is expected


def test_each_chat_is_in_one_share_and_shares_are_balanced() -> None:
    lengths = {index: 5 + (index * 37) % 90 for index in range(64)}
    indices = list(range(64))
    parts = []
    for rank in range(4):
        group = ProcessGroup()
        group.rank, group.size = rank, 4
        parts.append(group.share(indices, lengths))
    assert sorted(each for part in parts for each in part) == indices
    loads = [sum(lengths[each] for each in part) for part in parts]
    assert max(loads) - min(loads) <= max(lengths.values())
    assert max(loads) < 1.05 * min(loads)


def test_a_peer_that_leaves_first_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut() -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "barrier", cut)
    group = ProcessGroup()
    group.size = 2
    group.close()
