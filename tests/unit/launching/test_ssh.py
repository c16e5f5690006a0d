"""A run on another machine, by a real sshd: sent, started, listened to, fetched, stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import hosts
from support.runs import losses
from support.ssh_server import ALIAS, Server, ssh_server, why_not

from kolotune.foundation import config as configs
from kolotune.foundation.errors import ConfigError, DataError, LaunchError
from kolotune.launching import remote, ssh
from kolotune.launching.launcher import LATER, Launched, Order, Quiet
from kolotune.launching.ssh import Ssh
from kolotune.run_folder.layout import RunFolder

Call = Callable[..., tuple[int, str]]
TOKEN = "hf_PlantedTokenThatMustNotBeSeen"
needs_sshd = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with ssh_server(tmp_path / "ssh") as running:
        yield running


@pytest.fixture
def line(server: Server, tmp_path: Path, tiny_base: Path) -> list[Any]:
    """Options of a launch to the server, of a run that is quickly done."""
    place = ["--on", "ssh", "--host", server.name, "--ssh-config", server.config, "--python", sys.executable]
    run = ["--base-model", tiny_base, "--epochs", "1", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off"]
    more = ["--no-compare", "--quantization", "none", "--output-dir", tmp_path / "out"]
    return ["launch", *place, "--remote-folder", tmp_path / "far", *run, *more]


def all_bytes(*folders: Path) -> bytes:
    return b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


@needs_sshd
def test_a_run_there_gives_its_results_here(
    kolotune: Call, line: list[Any], write_chats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    chats = write_chats(6, name='it\'s "$(touch owned)"; `touch owned`.jsonl')
    code, output = kolotune(*line, chats, "--submit")
    assert code == 0, output
    run = RunFolder(tmp_path / "out")
    assert "training 1/2" in output.replace("  ", " ") or "training" in output
    assert "fetched to" in output and (run.adapter / "adapter_model.safetensors").is_file() and run.gguf.is_file()
    assert yaml.safe_load(run.config.read_text())["train_data"] == [str(chats)], "paths are those of here"
    assert str(tmp_path / "far") not in output
    code, output = kolotune("status", run.root)
    assert code == 0 and "will run" not in output, output
    assert not list(tmp_path.rglob("owned"))
    assert TOKEN.encode() not in all_bytes(tmp_path / "far", tmp_path / "out")


@needs_sshd
def test_what_goes_wrong_there_is_told_here(kolotune: Call, line: list[Any], tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": "none"}\n')
    code, output = kolotune(*line, chats, "--submit")
    assert code == 3 and f"{chats}:1" in output, output
    assert str(tmp_path / "far") not in output


@pytest.fixture
def waiting(server: Server, tmp_path: Path) -> Iterator[tuple[Ssh, Order]]:
    """A job of two machines that goes on and on: it waits for where they meet, a name that nobody has."""
    (tmp_path / "chats.jsonl").write_text("{}\n")
    options = {"train_data": "chats.jsonl", "nnodes": 2, "rdzv": "nobody.invalid:1", "output_dir": "out"}
    launcher = Ssh((server.name, ALIAS), str(tmp_path / "far"), sys.executable, str(server.config))
    order = Order(configs.resolve((options, "test", tmp_path)), "job-1", 1)
    launched = launcher.submit(order, Quiet())
    launched.write(RunFolder(order.config.output_dir))
    yield launcher, order
    launcher.cancel(launched, Quiet())


@needs_sshd
def test_a_broken_connection_is_taken_up_again_and_a_job_can_be_stopped(
    waiting: tuple[Ssh, Order], server: Server, monkeypatch: pytest.MonkeyPatch, kolotune: Call
) -> None:
    monkeypatch.setattr(ssh, "_AGAIN_SECONDS", 0.2)
    launcher, order = waiting
    run = RunFolder(order.config.output_dir)
    launched, codes = Launched.read(run), []
    following = threading.Thread(target=lambda: codes.append(launcher.follow(launched, Quiet())))
    following.start()
    lost: set[int] = set()
    for _ in range(2):
        lost |= connected(server, 2, lost)
        for each in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    connected(server, 2, lost)
    assert following.is_alive() and not codes
    with pytest.raises(LaunchError, match="is at work"):
        launcher.submit(order, Quiet())
    code, output = kolotune("cancel", run.root)
    assert code == 0 and "stopped: job job-1" in output, output
    following.join(120)
    assert codes == [130]


def connected(server: Server, count: int, lost: set[int]) -> set[int]:
    """The processes of `count` connections, once there are so many beside those that were lost."""
    deadline = time.monotonic() + 120
    while len(found := set(server.connections()) - lost) < count:
        assert time.monotonic() < deadline, "nobody is connected"
        time.sleep(0.05)
    return found


@needs_sshd
def test_a_machine_that_fails_stops_the_others(server: Server, tmp_path: Path, write_chats: Any) -> None:
    launcher, order = two_machines(server, tmp_path, write_chats(6))
    in_the_way = RunFolder(tmp_path / "far" / "job-1").machines
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    launched = launcher.submit(order, Quiet())
    with pytest.raises(LaunchError, match=f"{ALIAS}: .*machines"):
        launcher.follow(launched, Quiet())
    assert ended(tmp_path) == ["0.end", "1.end"], "it was stopped on both"


@needs_sshd
def test_the_first_machine_s_failure_stops_the_others(server: Server, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text("{}\n")  # only the first reads them: the second waits for it
    launcher, order = two_machines(server, tmp_path, chats)
    launched = launcher.submit(order, Quiet())
    assert launcher.follow(launched, Quiet()) == DataError.exit_code
    assert ended(tmp_path) == ["0.end", "1.end"], "it was stopped on both"


def two_machines(server: Server, folder: Path, chats: Path) -> tuple[Ssh, Order]:
    """A job of two machines, which are one with two names; nobody is where they are to meet."""
    options = {"train_data": chats.name, "nnodes": 2, "rdzv": "127.0.0.1:1", "output_dir": "out"}
    launcher = Ssh((server.name, ALIAS), str(folder / "far"), sys.executable, str(server.config))
    return launcher, Order(configs.resolve((options, "test", folder)), "job-1", 1)


def ended(folder: Path) -> list[str]:
    return sorted(each.name for each in (folder / "far" / ".launched" / "job-1").glob("*.end"))


@needs_sshd
def test_another_kolotune_there_is_refused(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "VERSION", "0.0.1")
    launcher = Ssh((server.name,), str(tmp_path / "far"), sys.executable, str(server.config))
    with pytest.raises(LaunchError, match=r"and here is 0\.0\.1"):
        launcher.submit(order_of(tmp_path), Quiet())


@needs_sshd
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"python": "/no/such/python"}, "No such file|not found"),
        ({"hosts": ("nobody.invalid",)}, "nobody.invalid: .*resolve"),
        ({"folder": "/proc/none"}, "No such file"),
    ],
)
def test_machines_that_can_not_be_used(change: dict[str, Any], words: str, server: Server, tmp_path: Path) -> None:
    fields = {"hosts": (server.name,), "folder": str(tmp_path / "far"), "python": sys.executable, **change}
    with pytest.raises(LaunchError, match=words):
        Ssh(**fields, ssh_config=str(server.config)).submit(order_of(tmp_path), Quiet())


def order_of(folder: Path, machines: int = 1) -> Order:
    (folder / "chats.jsonl").write_text("{}\n")
    options = {"train_data": "chats.jsonl", "nnodes": machines, "rdzv": LATER, "output_dir": "out"}
    return Order(configs.resolve((options, "test", folder)), "job-1", 1)


@pytest.mark.parametrize(
    "launcher",
    [
        Ssh(()),
        Ssh(("-oProxyCommand=touch owned",)),
        Ssh(("a b",)),
        Ssh(("$(touch owned)",)),
        Ssh(("a\nb",)),
        Ssh(("me@-a",)),
        Ssh(("a", "a")),
        Ssh(("a", "b")),
        Ssh(("a",), folder="$(x)"),
        Ssh(("a",), folder="-x"),
        Ssh(("a",), python="py;thon"),
    ],
)
def test_names_that_ssh_or_a_shell_would_misread(launcher: Ssh, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        launcher.plan(order_of(tmp_path))


def test_a_plan_asks_nobody_and_shows_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no ssh
    plan = Ssh(("me@a", "b")).plan(order_of(tmp_path, 2))
    text = "\n".join(plan.steps)
    assert "(me@a:) python3 -P -m kolotune run" in text and "(b:) python3 -P -m kolotune train" in text
    assert text.count("--rdzv=a:29500") == 2 and "a tar of chats.jsonl" in text
    ((name, config),) = plan.files
    assert name.endswith("/kolotune.yaml") and "HOME/kolotune-runs/.inputs/" in config


@needs_sshd
@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not())
def test_two_hosts_train_together(
    kolotune: Call, tiny_base: Path, write_chats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    chats = write_chats(24)
    run = ["--base-model", tiny_base, "--epochs", "2", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off"]
    more = ["--no-compare", "--quantization", "none"]
    assert kolotune("run", chats, *run, *more, "--output-dir", tmp_path / "alone")[0] == 0
    with hosts.two_hosts() as (first, second), contextlib.ExitStack() as servers:
        for each in (first, second):
            servers.enter_context(ssh_server(tmp_path / "ssh", address=each.address, inside=each.argv()))
        place = ["--on", "ssh", "--host", first.address, "--host", second.address, "--python", sys.executable]
        place += ["--ssh-config", tmp_path / "ssh" / "config", "--remote-folder", tmp_path / "far"]
        line = [sys.executable, "-m", "kolotune", "launch", chats, *place, *run, *more]
        argv = [str(each) for each in [*line, "--submit", "--output-dir", tmp_path / "out"]]
        done = subprocess.run(first.argv(*argv), capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, done.stdout + done.stderr
        assert second.sent() > 10_000, "they talked over the network"
    here = RunFolder(tmp_path / "out")
    assert losses(here.metrics) == pytest.approx(losses(RunFolder(tmp_path / "alone").metrics), abs=1e-4)
    assert here.gguf.is_file() and not here.machines.exists(), "the second one's folder is no result"
