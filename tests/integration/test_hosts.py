"""Two hosts that train together over a network, and one that is lost and comes back."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.hosts import Host, skip_reason, two_hosts
from support.runs import losses
from support.training import random_chats

from kolotune.engines.events import StepDone, event_in
from kolotune.engines.job import TrainJob
from kolotune.engines.native import training
from kolotune.planning import network
from kolotune.run_folder.metrics import read_metrics
from kolotune.weights.model_shape import AdapterShape, read_shape

pytestmark = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())

OPTIONS = {"epochs": 4, "batch_size": 8, "checkpoint_steps": 1}
PORT = 29531
MEGABITS, STEPS = 100, 5


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as made:
        yield made


def start(host: Host, job: TrainJob) -> subprocess.Popen[str]:
    folder = Path(job.metrics).parent
    job.write(folder / "job.json")
    argv = host.argv(sys.executable, "-m", "kolotune.engines.native", str(folder / "job.json"))
    with (folder / "log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )


def log(job: TrainJob) -> str:
    return (Path(job.metrics).parent / "log").read_text(encoding="utf-8")


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def jobs_for(training_folder: Any, hosts: tuple[Host, Host], **options: Any) -> list[TrainJob]:
    """Return the same training for both hosts, each with its own folder; they meet at the first."""
    meeting = {"nproc": 2, "nnodes": 2, "rdzv": f"{hosts[0].address}:{PORT}"}
    return [training_folder.job(host.name, **meeting, **OPTIONS, **options) for host in hosts]


def finish(*children: subprocess.Popen[str], jobs: list[TrainJob]) -> None:
    for child, job in zip(children, jobs, strict=True):
        assert child.wait(timeout=240) == 0, log(job)


def test_two_hosts_make_what_one_process_makes(hosts: tuple[Host, Host], make_training: Callable[..., Any]) -> None:
    folder = make_training("llama", chats=48, held_out=6)
    alone = folder.job("alone", **OPTIONS)
    training.train(alone)
    jobs = jobs_for(folder, hosts)
    children = [start(host, job) for host, job in zip(hosts, jobs, strict=True)]
    _wait_for(lambda: bool(losses(Path(jobs[0].metrics))), Path(jobs[0].metrics))
    connections = hosts[0].run("ss", "-Htn", "state", "established")
    finish(*children, jobs=jobs)
    assert hosts[1].address in connections, "the ranks of the two hosts are connected"
    gradients = 4 * sum(each.numel() for each in adapter(alone).values())
    assert all(host.sent() > gradients * len(losses(Path(alone.metrics))) for host in hosts), (
        "each step sends its gradients"
    )
    for job in jobs:
        assert losses(Path(job.metrics)) == pytest.approx(losses(Path(alone.metrics)), abs=1e-4)
        assert '"processes": 4' in log(job)
    first, second = map(adapter, jobs)
    assert all(torch.equal(first[name], second[name]) for name in first), "both hosts have the result"


@pytest.mark.slow
def test_a_sharded_base_sends_what_the_formula_says(
    hosts: tuple[Host, Host], make_training: Callable[..., Any]
) -> None:
    folder = make_training("llama", chats=32, hidden_size=256, intermediate_size=512, num_hidden_layers=4)
    jobs = [replace(job, epochs=1, sharded=True, checkpoint_steps=0) for job in jobs_for(folder, hosts)]
    children = [start(host, job) for host, job in zip(hosts, jobs, strict=True)]
    finish(*children, jobs=jobs)
    shape = read_shape(folder.root / "base")
    steps = len(losses(Path(jobs[0].metrics)))
    base = network.sharded_base_bytes(4 * shape.layer_weight_count, 4, 1)
    gradients = network.gradient_bytes(AdapterShape.of(shape, jobs[0].lora_rank, ["all-linear"]).weight_count, 4)
    expected = steps * (base + gradients)
    print(f"{steps} steps: expected {expected / 1e6:.1f} MB, sent {[round(host.sent() / 1e6, 1) for host in hosts]} MB")
    for host in hosts:
        assert host.sent() == pytest.approx(expected, rel=0.2)


@pytest.mark.slow  # a lost host is noticed only after fifteen seconds
def test_a_host_that_is_lost_and_comes_back_costs_one_interval(
    hosts: tuple[Host, Host], make_training: Callable[..., Any]
) -> None:
    folder = make_training("llama", chats=160, held_out=6)
    alone = folder.job("alone", **OPTIONS)
    training.train(alone)
    jobs = jobs_for(folder, hosts)
    first, second = (start(host, job) for host, job in zip(hosts, jobs, strict=True))
    _wait_for(lambda: max(losses(Path(jobs[1].metrics)), default=0) >= 3, Path(jobs[1].metrics))
    hosts[1].lose()
    second.wait()
    assert max(losses(Path(jobs[0].metrics))) < len(losses(Path(alone.metrics))), "it was lost in the middle"
    second = start(hosts[1], jobs[1])
    finish(first, second, jobs=jobs)
    assert "resuming from step" in log(jobs[0])
    assert losses(Path(jobs[0].metrics)) == pytest.approx(losses(Path(alone.metrics)), abs=1e-4)
    steps = [event.step for event in map(event_in, log(jobs[0]).splitlines()) if isinstance(event, StepDone)]
    assert len(steps) - len(set(steps)) <= 1, "checkpoints are one step apart here"


@pytest.mark.slow  # it measures, and needs an idle machine
def test_a_slow_link_costs_what_the_formula_says(hosts: tuple[Host, Host], make_training: Callable[..., Any]) -> None:
    """With the accumulation that follows from it, the link takes less than a tenth of a step."""
    shape = {"hidden_size": 256, "intermediate_size": 512}
    folder = make_training("llama", chats=random_chats(4800, 1, 150, 250), **shape)

    def seconds_of_a_step(name: str, **options: Any) -> float:
        jobs = [
            replace(
                job,
                **{"epochs": 1, "lora_rank": 128, "checkpoint_steps": 0, **options},
                metrics=f"{job.metrics}-{name}",
            )
            for job in jobs_for(folder, hosts)
        ]
        children = [start(host, job) for host, job in zip(hosts, jobs, strict=True)]
        _wait_for(lambda: len(_times(jobs[0])) > STEPS, Path(jobs[0].metrics))
        for host in hosts:
            host.lose()
        for child in children:
            child.wait()
        times = _times(jobs[0])[1:]  # the first step compiles and connects
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    weights = AdapterShape.of(read_shape(folder.root / "base"), 128, ["all-linear"]).weight_count
    sent = network.gradient_bytes(weights, 4)
    transfer = network.transfer_seconds(sent, MEGABITS)
    fast = seconds_of_a_step("fast")
    for host in hosts:
        host.slow_down(f"{MEGABITS}mbit")
    before = hosts[0].sent()
    slow = seconds_of_a_step("slow")
    print(f"a step: {fast:.3f} s, {slow:.3f} s at {MEGABITS} Mbit/s; the formula says {transfer:.3f} s more")
    assert slow - fast == pytest.approx(transfer, rel=0.2)
    assert hosts[0].sent() - before > sent * STEPS
    for host in hosts:
        host.slow_down("10gbit")
    computing = seconds_of_a_step("several", gradient_accumulation=4)
    for host in hosts:
        host.slow_down(f"{MEGABITS}mbit")
    enough = network.Traffic(sent, transfer, computing, accumulation=4).enough
    assert enough is not None and 1 < enough < 100
    accumulated = seconds_of_a_step("accumulated", gradient_accumulation=enough)
    share = transfer / accumulated
    print(f"with an accumulation of {enough}: {accumulated:.3f} s, {100 * share:.1f}% of it on the link")
    assert share < network.LARGEST_SHARE


def _times(job: TrainJob) -> list[float]:
    """Return when each step ended."""
    lines = read_metrics(Path(job.metrics), skip_damaged=True) if Path(job.metrics).is_file() else []
    return [line.time for line in lines if line.loss is not None and line.time is not None]


def _wait_for(condition: Callable[[], bool], file: Path) -> None:
    deadline = time.monotonic() + 180
    while not (file.is_file() and condition()):
        assert time.monotonic() < deadline, "no metrics in time"
        time.sleep(0.02)
