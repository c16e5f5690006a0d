"""Slurm's script, submitit's executor for this machine, and a real Slurm where there is one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import submitit
from support import hosts
from support import slurm_cluster as cluster_support
from support.jobs import job_spec
from support.runs import losses
from support.slurm_cluster import slurm_cluster

from kolotune.foundation.errors import ConfigError, LaunchError
from kolotune.launching.job_output import SilentReporter
from kolotune.launching.launcher import JobSpec, LaunchedJob
from kolotune.launching.slurm import Slurm, SlurmTask, _task, _without_secrets
from kolotune.run_folder.layout import RunFolder

Call = Callable[..., tuple[int, str]]
WHY_NOT = cluster_support.skip_reason() or hosts.skip_reason()


def script(slurm: Slurm, job: JobSpec) -> str:
    return dict(slurm.plan(job).files)[str(job.config.output_dir / ".kolotune/launching/submission_file_JOB.sh")]


def flags(text: str) -> dict[str, str]:
    """Return the options of sbatch in a script."""
    lines = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert all(len(words) == 1 for words in lines)
    return dict(words[0].removeprefix("--").split("=", 1) for words in lines)


def test_the_script_requests_the_resources(tmp_path: Path) -> None:
    slurm = Slurm(partition="gpu", account="lab", qos="high", more=("constraint=a100",))
    options = flags(script(slurm, job_spec(tmp_path, 4, gpus=8, cpus=16, memory_gb=1.5)))
    expected = {
        "job-name": "job-1", "nodes": "4", "ntasks-per-node": "1", "time": "90", "gpus-per-node": "8",
        "cpus-per-task": "16", "mem": "1536MB", "partition": "gpu", "account": "lab", "qos": "high",
        "constraint": "a100",
    }  # fmt: skip
    assert expected.items() <= options.items()
    assert "gpus-per-node" not in flags(script(Slurm(), job_spec(tmp_path)))


def test_the_planned_script_is_the_submitted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("srun", "sbatch"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\necho Submitted batch job 7\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = job_spec(tmp_path, 2, gpus=1)
    launched = Slurm().submit(job, SilentReporter())
    assert (launched.job, launched.machines) == ("7", 2)
    folder = RunFolder(job.config.output_dir).launching
    assert (folder / "7_submission.sh").read_text() == script(Slurm(), job)
    assert submitit.SlurmJob(folder, "7").submission().function == SlurmTask(_task(job))


def test_a_folder_with_a_space_and_quotes_is_one_word(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "$(touch owned)" folder'
    folder.mkdir()
    text = script(Slurm(), job_spec(folder))
    command = next(line for line in text.splitlines() if line.startswith("srun "))
    assert shlex.split(command)[-1] == str(folder / "out/.kolotune/launching")
    assert flags(text)["output"].startswith(str(folder))


@pytest.mark.parametrize(
    "slurm",
    [
        Slurm(partition="a b"),
        Slurm(account="$(x)"),
        Slurm(qos="a\n#SBATCH --wrap=x"),
        Slurm(more=("constraint",)),
        Slurm(more=("a b=c",)),
        Slurm(more=("comment=a\nb",)),
    ],
)
def test_words_that_sbatch_would_misread(slurm: Slurm, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        slurm.plan(job_spec(tmp_path))


@pytest.mark.parametrize("name", ["a%jb", "a\nb"])
def test_folders_that_slurm_would_misread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match="output-dir"):
        Slurm().plan(job_spec(tmp_path / name))


def test_secrets_are_exported_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "a", "WANDB_API_KEY": "b", "aws_secret_access_key": "c", "DB_PASSWORD": "d"}
    for name, value in {**secrets, "LANGUAGE": "en"}.items():
        monkeypatch.setenv(name, value)
    with _without_secrets(keep=False):
        assert not set(secrets) & set(os.environ) and os.environ["LANGUAGE"] == "en"
    with _without_secrets(keep=True):
        assert set(secrets) <= set(os.environ)
    assert all(os.environ[name] == value for name, value in secrets.items())


def test_slurm_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="no sbatch"):
        Slurm().submit(job_spec(tmp_path), SilentReporter())


def test_a_job_that_ended_without_output_is_an_error(tmp_path: Path) -> None:
    launched = LaunchedJob("local", {}, str(2**22 + 1), 1, str(tmp_path))
    logs = RunFolder(tmp_path).launching
    logs.mkdir(parents=True)
    (logs / f"{launched.job}_0_log.err").write_text("no space left\n")
    with pytest.raises(LaunchError, match="no space left"):
        Slurm("local").follow(launched, SilentReporter())


@pytest.mark.slow
def test_submitits_executor_for_this_machine_trains(
    kolotune: Call, write_chats: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted in the middle of training, as Slurm does it, the job resumes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_Planted")
    run = RunFolder(tmp_path / "out")
    options = ["--base-model", tiny_base, "--epochs", "30", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off"]
    more = ["--no-compare", "--quantization", "none", "--output-dir", run.root, "--checkpoint-steps", "1"]
    line = ["launch", write_chats(24), "--on", "local", *options, *more]
    assert kolotune(*line)[0] == 0 and not run.root.exists(), "nothing is done without --submit"
    code, output = kolotune(*line, "--submit", "--detach")
    assert code == 0 and "kolotune follow" in output, output
    launched = LaunchedJob.read(run)
    deadline = time.monotonic() + 300
    while not (run.metrics.is_file() and max(losses(run.metrics), default=0) >= 3):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.05)
    _preempt(int(launched.job))
    code, output = kolotune("follow", run.root)
    assert code == 0, output
    assert "resuming from step" in (run.log("launched").read_text() + run.log("train").read_text())
    assert run.gguf.is_file() and "will run" not in kolotune("status", run.root)[1]
    assert not planted(run.root)


def test_ctrl_c_in_a_terminal_does_not_stop_a_job_on_this_machine(
    kolotune: Call, write_chats: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = RunFolder(tmp_path / "out")
    options = ["--base-model", tiny_base, "--epochs", "1", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off"]
    more = ["--no-compare", "--quantization", "none", "--output-dir", run.root]
    argv = [sys.executable, "-m", "kolotune", "launch", write_chats(6), "--on", "local", *options, *more, "--submit"]
    with subprocess.Popen(list(map(str, argv)), stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert any("prepare: reading" in line for line in process.stdout), "it never began"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes that were started from it
        assert process.wait(60) == 130
    code, output = kolotune("follow", run.root)
    assert code == 0 and run.gguf.is_file(), output


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_a_real_slurm_of_two_machines_trains(
    kolotune: Call, write_chats: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_Planted")
    chats, run = write_chats(24), RunFolder(tmp_path / "out")
    options = ["--base-model", tiny_base, "--epochs", "2", "--lora-rank", "2", "--dtype", "fp32", "--compile", "off"]
    more = ["--no-compare", "--quantization", "none"]
    assert kolotune("run", chats, *options, *more, "--output-dir", tmp_path / "alone")[0] == 0
    with hosts.two_hosts() as both, slurm_cluster(both) as cluster:
        line = ["launch", chats, "--on", "slurm", "--nnodes", "2", "--output-dir", run.root, *options, *more]
        output = cluster.run(sys.executable, "-m", "kolotune", *map(str, line), "--submit")
        assert "submitted: job " in output and "ok  train: " in output, output
        assert not planted(tmp_path, cluster.folder), "Slurm keeps the environment of a job"
        assert all(host.sent() > 10_000 for host in both), "they communicated over the network"
        # One machine fails: the job ends on both, with the cause.
        run.machines.rename(tmp_path / "away")
        run.machines.write_text("in the way")
        with pytest.raises(subprocess.CalledProcessError) as failed:
            cluster.run(sys.executable, "-m", "kolotune", *map(str, line), "--submit", "--epochs", "3")
        assert (failed.value.returncode, "machine 1: " in failed.value.stderr) == (29, True), failed.value.stderr
    assert losses(run.metrics) == pytest.approx(losses(RunFolder(tmp_path / "alone").metrics), abs=1e-4)


def planted(*folders: Path) -> list[Path]:
    """Return the files that contain the planted token."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if b"hf_Planted" in path.read_bytes()]


def _preempt(controller: int) -> None:
    """Signal each process of a job, as Slurm does."""
    import psutil
    from submitit.local.local import LocalJobEnvironment

    for process in psutil.Process(controller).children(recursive=True):
        process.send_signal(LocalJobEnvironment._usr_sig())


def test_the_hint_names_the_extra_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    from kolotune.foundation.errors import ToolchainError

    with pytest.raises(ToolchainError) as raised:
        Slurm().plan(job_spec(tmp_path))
    assert ".[cluster]" in raised.value.hint
