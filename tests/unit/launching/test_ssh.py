"""A run on another machine, through a real sshd: sent, started, followed, fetched, stopped."""

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
from support.jobs import job_spec
from support.runs import losses
from support.ssh_server import ALIAS, Server, skip_reason, ssh_server

from kolotune.foundation.errors import ConfigError, DataError, LaunchError
from kolotune.launching import remote, ssh
from kolotune.launching.job_output import SilentReporter
from kolotune.launching.launcher import JobSpec, LaunchedJob
from kolotune.launching.ssh import Ssh
from kolotune.run_folder.layout import RunFolder

Call = Callable[..., tuple[int, str]]
TOKEN = "hf_PlantedTokenThatMustNotBeSeen"
needs_sshd = pytest.mark.skipif(bool(skip_reason()), reason=skip_reason())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with ssh_server(tmp_path / "ssh") as running:
        yield running


@pytest.fixture
def line(server: Server, tmp_path: Path, tiny_base: Path) -> list[Any]:
    """Return the options that launch a short run on the server."""
    place = ["--on", "ssh", "--host", server.name, "--ssh-config", server.config, "--python", sys.executable]
    run = ["--base-model", tiny_base, "--epochs", "1", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off"]
    more = ["--no-compare", "--quantization", "none", "--output-dir", tmp_path / "out"]
    return ["launch", *place, "--remote-folder", tmp_path / "far", *run, *more]


def all_bytes(*folders: Path) -> bytes:
    return b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file())


@needs_sshd
def test_the_results_of_a_remote_run_are_fetched(
    kolotune: Call, line: list[Any], write_chats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    chats = write_chats(6, name='it\'s "$(touch owned)"; `touch owned`.jsonl')
    code, output = kolotune(*line, chats, "--submit")
    assert code == 0, output
    run = RunFolder(tmp_path / "out")
    assert "training 1/2" in output.replace("  ", " ") or "training" in output
    assert "fetched to" in output and (run.adapter / "adapter_model.safetensors").is_file() and run.gguf.is_file()
    assert yaml.safe_load(run.config.read_text())["train_data"] == [str(chats)], "paths are local"
    assert str(tmp_path / "far") not in output
    code, output = kolotune("status", run.root)
    assert code == 0 and "will run" not in output, output
    assert not list(tmp_path.rglob("owned"))
    assert TOKEN.encode() not in all_bytes(tmp_path / "far", tmp_path / "out")


@needs_sshd
def test_a_remote_failure_is_shown_with_local_paths(kolotune: Call, line: list[Any], tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": "none"}\n')
    code, output = kolotune(*line, chats, "--submit")
    assert code == 3 and f"{chats}:1" in output, output
    assert str(tmp_path / "far") not in output


@pytest.fixture
def waiting(server: Server, tmp_path: Path) -> Iterator[tuple[Ssh, JobSpec]]:
    """A job of two machines that never ends: it waits for a machine that does not exist."""
    launcher = Ssh((server.name, ALIAS), str(tmp_path / "far"), sys.executable, str(server.config))
    spec = job_spec(tmp_path, 2, "nobody.invalid:1")
    launched = launcher.submit(spec, SilentReporter())
    launched.write(RunFolder(spec.config.output_dir))
    yield launcher, spec
    launcher.cancel(launched, SilentReporter())


@needs_sshd
def test_a_broken_connection_is_restored_and_a_job_can_be_cancelled(
    waiting: tuple[Ssh, JobSpec], server: Server, monkeypatch: pytest.MonkeyPatch, kolotune: Call
) -> None:
    monkeypatch.setattr(ssh, "_RECONNECT_SECONDS", 0.2)
    launcher, spec = waiting
    run = RunFolder(spec.config.output_dir)
    launched, codes = LaunchedJob.read(run), []
    following = threading.Thread(target=lambda: codes.append(launcher.follow(launched, SilentReporter())))
    following.start()
    lost: set[int] = set()
    for _ in range(2):
        lost |= connected(server, 2, lost)
        for process in lost:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    connected(server, 2, lost)
    assert following.is_alive() and not codes
    with pytest.raises(LaunchError, match="still running"):
        launcher.submit(spec, SilentReporter())
    code, output = kolotune("cancel", run.root)
    assert code == 0 and "stopped: job job-1" in output, output
    following.join(120)
    assert codes == [130]


def connected(server: Server, count: int, lost: set[int]) -> set[int]:
    """Wait for `count` connections that are not lost; return their processes."""
    deadline = time.monotonic() + 120
    while len(processes := set(server.connections()) - lost) < count:
        assert time.monotonic() < deadline, "there is no connection"
        time.sleep(0.05)
    return processes


@needs_sshd
def test_a_failing_machine_stops_the_others(server: Server, tmp_path: Path, write_chats: Any) -> None:
    write_chats(6)
    launcher, spec = two_machines(server, tmp_path)
    in_the_way = RunFolder(tmp_path / "far" / "job-1").machines
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    launched = launcher.submit(spec, SilentReporter())
    with pytest.raises(LaunchError, match=f"{ALIAS}: .*machines"):
        launcher.follow(launched, SilentReporter())
    assert ended(tmp_path) == ["0.end", "1.end"], "the job was stopped on both"


@needs_sshd
def test_a_failure_of_the_first_machine_stops_the_others(server: Server, tmp_path: Path) -> None:
    # Only the first machine reads the chats, which are bad: the second one waits for it.
    launcher, spec = two_machines(server, tmp_path)
    launched = launcher.submit(spec, SilentReporter())
    assert launcher.follow(launched, SilentReporter()) == DataError.exit_code
    assert ended(tmp_path) == ["0.end", "1.end"], "the job was stopped on both"


def two_machines(server: Server, folder: Path) -> tuple[Ssh, JobSpec]:
    """Return a job of two machines, which are one with two names; their meeting point does not answer."""
    launcher = Ssh((server.name, ALIAS), str(folder / "far"), sys.executable, str(server.config))
    return launcher, job_spec(folder, 2, "127.0.0.1:1")


def ended(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "far" / ".launched" / "job-1").glob("*.end"))


@needs_sshd
def test_another_version_is_refused(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "VERSION", "0.0.1")
    launcher = Ssh((server.name,), str(tmp_path / "far"), sys.executable, str(server.config))
    with pytest.raises(LaunchError, match=r"0\.0\.1"):
        launcher.submit(job_spec(tmp_path), SilentReporter())


@needs_sshd
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"python": "/no/such/python"}, "No such file|not found"),
        ({"hosts": ("nobody.invalid",)}, "nobody.invalid: .*resolve"),
        ({"folder": "/proc/none"}, "No such file"),
    ],
)
def test_unusable_machines(change: dict[str, Any], message: str, server: Server, tmp_path: Path) -> None:
    fields = {"hosts": (server.name,), "folder": str(tmp_path / "far"), "python": sys.executable, **change}
    with pytest.raises(LaunchError, match=message):
        Ssh(**fields, ssh_config=str(server.config)).submit(job_spec(tmp_path), SilentReporter())


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
        launcher.plan(job_spec(tmp_path))


def test_a_plan_contacts_nobody_and_shows_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no ssh
    plan = Ssh(("me@a", "b")).plan(job_spec(tmp_path, 2))
    text = "\n".join(plan.steps)
    assert "(me@a:) python3 -P -m kolotune run" in text and "(b:) python3 -P -m kolotune train" in text
    assert text.count("--rdzv=a:29500") == 2 and "a tar of chats.jsonl" in text
    ((name, config),) = plan.files
    assert name.endswith("/kolotune.yaml") and "HOME/kolotune-runs/.inputs/" in config


@needs_sshd
@pytest.mark.slow
@pytest.mark.skipif(bool(hosts.skip_reason()), reason=hosts.skip_reason())
def test_two_hosts_train_together(
    kolotune: Call, tiny_base: Path, write_chats: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    chats = write_chats(24)
    run = ["--base-model", tiny_base, "--epochs", "2", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off"]
    more = ["--no-compare", "--quantization", "none"]
    assert kolotune("run", chats, *run, *more, "--output-dir", tmp_path / "alone")[0] == 0
    with hosts.two_hosts() as (first, second), contextlib.ExitStack() as servers:
        for host in (first, second):
            servers.enter_context(ssh_server(tmp_path / "ssh", address=host.address, inside=host.argv()))
        place = ["--on", "ssh", "--host", first.address, "--host", second.address, "--python", sys.executable]
        place += ["--ssh-config", tmp_path / "ssh" / "config", "--remote-folder", tmp_path / "far"]
        line = [sys.executable, "-m", "kolotune", "launch", chats, *place, *run, *more]
        argv = [str(word) for word in [*line, "--submit", "--output-dir", tmp_path / "out"]]
        done = subprocess.run(first.argv(*argv), capture_output=True, text=True, timeout=580)
        assert done.returncode == 0, done.stdout + done.stderr
        assert second.sent() > 10_000, "they communicated over the network"
    here = RunFolder(tmp_path / "out")
    assert losses(here.metrics) == pytest.approx(losses(RunFolder(tmp_path / "alone").metrics), abs=1e-4)
    assert here.gguf.is_file() and not here.machines.exists(), "the second machine's folder is not a result"
