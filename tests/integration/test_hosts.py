"""Two hosts that train together over a network, and one that is lost and comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.hosts import Host, two_hosts, why_not

from kolotune.engines.job import TrainJob, event_of
from kolotune.engines.native import training

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

OPTIONS = {"epochs": 4, "batch_size": 8, "checkpoint_steps": 1}
PORT = 29531


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


def losses(job: TrainJob) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(job.metrics).read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def adapter(job: TrainJob) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(job.adapter) / "adapter_model.safetensors"))


def jobs_for(room: Any, hosts: tuple[Host, Host], **options: Any) -> list[TrainJob]:
    """The same training on both, each with a folder of its own; they meet at the first."""
    place = {"nproc": 2, "nnodes": 2, "rdzv": f"{hosts[0].address}:{PORT}"}
    return [room.job(host.name, **place, **OPTIONS, **options) for host in hosts]


def finish(*children: subprocess.Popen[str], jobs: list[TrainJob]) -> None:
    for child, job in zip(children, jobs, strict=True):
        assert child.wait(timeout=240) == 0, log(job)


def test_two_hosts_make_what_one_process_makes(hosts: tuple[Host, Host], training_room: Callable[..., Any]) -> None:
    room = training_room("llama", chats=48, held_out=6)
    alone = room.job("alone", **OPTIONS)
    training.train(alone)
    jobs = jobs_for(room, hosts)
    children = [start(host, job) for host, job in zip(hosts, jobs, strict=True)]
    _wait_for(lambda: bool(losses(jobs[0])), Path(jobs[0].metrics))
    talking = hosts[0].told("ss", "-Htn", "state", "established")
    finish(*children, jobs=jobs)
    assert hosts[1].address in talking, "the ranks of the two hosts are connected"
    gradients = 4 * sum(each.numel() for each in adapter(alone).values())
    assert all(host.sent() > gradients * len(losses(alone)) for host in hosts), "each step's gradients travelled"
    for job in jobs:
        assert losses(job) == pytest.approx(losses(alone), abs=1e-4)
        assert '"processes": 4' in log(job)
    first, second = map(adapter, jobs)
    assert all(torch.equal(first[name], second[name]) for name in first), "both hosts have the result"


@pytest.mark.slow  # it is missed only after fifteen seconds
def test_a_host_that_is_lost_and_comes_back_costs_one_interval(
    hosts: tuple[Host, Host], training_room: Callable[..., Any]
) -> None:
    room = training_room("llama", chats=160, held_out=6)
    alone = room.job("alone", **OPTIONS)
    training.train(alone)
    jobs = jobs_for(room, hosts)
    first, second = (start(host, job) for host, job in zip(hosts, jobs, strict=True))
    _wait_for(lambda: max(losses(jobs[1]), default=0) >= 3, Path(jobs[1].metrics))
    hosts[1].lose()
    second.wait()
    assert max(losses(jobs[0])) < len(losses(alone)), "it was lost in the middle"
    second = start(hosts[1], jobs[1])
    finish(first, second, jobs=jobs)
    assert "going on from step" in log(jobs[0])
    assert losses(jobs[0]) == pytest.approx(losses(alone), abs=1e-4)
    events = [event for line in log(jobs[0]).splitlines() if (event := event_of(line))]
    steps = [event["step"] for event in events if event["event"] == "step"]
    assert len(steps) - len(set(steps)) <= 1, "an interval is one step here"


def _wait_for(condition: Callable[[], bool], file: Path) -> None:
    deadline = time.monotonic() + 180
    while not (file.is_file() and condition()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.02)
