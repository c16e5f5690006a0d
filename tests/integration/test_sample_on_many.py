"""One config file on one process, on four, and on two hosts gives the same losses on the sample.

The container has `tests/container/test_demo.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.hosts import Host, skip_reason, two_hosts
from support.runs import losses

from kolotune.run_folder.layout import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PORT = 29551
# fp32, so that only the order of sums differs; a part of the sample is held out.
OPTIONS = {"base_model": "smollm2-135m", "epochs": 1, "learning_rate": 1e-3, "dtype": "fp32", "eval_split": 0.1}


@pytest.fixture(scope="module")
def config(sample_chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "kolotune.yaml"
    file.write_text(yaml.safe_dump({"train_data": [str(sample_chats)], **OPTIONS}))
    return file


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("alone") / "run")
    finish(start(["prepare", "--config", config], run), start(["train", run.root], run))
    assert losses(run.metrics) and losses(run.metrics, "held_out_loss")
    return run


def start(arguments: list[object], run: RunFolder, host: Host | None = None, threads: int = 2) -> list[str]:
    """Return the command that starts kolotune, on a host or here."""
    folder = ["--output-dir", run.root] if arguments[0] != "train" else []
    argv = ["env", f"OMP_NUM_THREADS={threads}", sys.executable, "-m", "kolotune", *map(str, [*arguments, *folder])]
    return host.argv(*argv) if host is not None else argv


def finish(*commands: list[str]) -> None:
    """Run commands one after another."""
    for argv in commands:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr


def require_same(run: RunFolder, other: RunFolder) -> None:
    ours, theirs = losses(run.metrics), losses(other.metrics)
    print(f"{len(ours)} steps, losses differ by at most {max(abs(ours[step] - theirs[step]) for step in theirs):.1e}")
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert losses(run.metrics, "held_out_loss") == pytest.approx(losses(other.metrics, "held_out_loss"), rel=1e-3)


def test_four_processes(alone: RunFolder, config: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    prepare = start(["prepare", "--config", config], run)
    finish(prepare, start(["train", run.root, "--nproc", "4"], run, threads=1))
    require_same(run, alone)


@pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())
def test_two_hosts_of_two_processes(alone: RunFolder, config: Path, tmp_path: Path) -> None:
    with two_hosts() as hosts:
        runs = [RunFolder(tmp_path / host.name) for host in hosts]
        meeting = ["--nnodes", "2", "--nproc", "2", "--rdzv", f"{hosts[0].address}:{PORT}"]
        children = []
        for host, run in zip(hosts, runs, strict=True):
            finish(start(["prepare", "--config", config], run, host))
            argv = start(["train", run.root, *meeting], run, host, threads=1)
            with (tmp_path / f"{host.name}.log").open("w") as log:
                children.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT))
        wait_for_steps(runs[0], 2)
        ranks = [ranks_on(host) for host in hosts]
        connected = [host.run("ss", "-Htn", "state", "established") for host in hosts]
        for child, host in zip(children, hosts, strict=True):
            assert child.wait(timeout=1800) == 0, (tmp_path / f"{host.name}.log").read_text()
        print(f"ranks at work: {dict(zip([host.address for host in hosts], ranks, strict=True))}")
        assert sorted(rank for host in ranks for rank in host) == [0, 1, 2, 3]
        assert all(len(host) == 2 for host in ranks), "two on each host"
        assert hosts[1].address in connected[0] and hosts[0].address in connected[1]
        for run in runs:
            require_same(run, alone)


def wait_for_steps(run: RunFolder, count: int) -> None:
    deadline = time.monotonic() + 600
    while len(losses(run.metrics)) < count:
        assert time.monotonic() < deadline, "no step came"
        time.sleep(0.2)


def ranks_on(host: Host) -> list[int]:
    """Return the ranks of the processes on a host."""
    ranks = []
    for number in subprocess.check_output(["ip", "netns", "pids", host.name], text=True).split():
        try:
            variables = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        settings = [each for each in variables if each.startswith(b"RANK=")]
        if settings and os.path.basename(os.readlink(f"/proc/{number}/exe")).startswith("python"):
            ranks.append(int(settings[0].removeprefix(b"RANK=")))
    return sorted(set(ranks))
