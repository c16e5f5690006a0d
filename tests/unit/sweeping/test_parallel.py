"""Trials in parallel, with real launchers: this machine, a real sshd, a real Slurm."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import hosts
from support import slurm_cluster as cluster_support
from support.runs import states
from support.slurm_cluster import slurm_cluster
from support.ssh_server import ALIAS, Server, ssh_server
from support.ssh_server import skip_reason as no_ssh

from kolotune.foundation.config import Config
from kolotune.foundation.errors import LaunchError
from kolotune.foundation.reporter import PlainReporter
from kolotune.launching.job_names import name_for
from kolotune.launching.launcher import JobSpec, LaunchedJob, Launcher
from kolotune.launching.slurm import Slurm
from kolotune.launching.ssh import Ssh
from kolotune.run_folder.layout import RunFolder
from kolotune.sweeping import parallel, record, trials
from kolotune.sweeping.parallel import TrialLaunchers
from kolotune.sweeping.space import parse

Call = Callable[..., tuple[int, str]]
NO_SLURM = cluster_support.skip_reason() or hosts.skip_reason()


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def on(*launchers: Launcher) -> TrialLaunchers:
    return TrialLaunchers(launchers, lambda config: JobSpec(config, name_for(config.output_dir), 1))


def run_in_turn(config: Config, folder: Path, *varied: str) -> record.SweepRecord:
    """Run the same sweep, one trial after the other."""
    return trials.run(dataclasses.replace(config, output_dir=folder), parse(varied), 10, PlainReporter())


def result_at(output: str) -> int:
    """Return the offset of the first trial's result; its job reports held-out losses at any time before."""
    match = re.search(r"trial 1: held-out loss [\d.]+ \(", output)
    assert match, output
    return match.start()


@pytest.mark.slow
def test_parallel_trials_have_the_result_of_sequential_ones(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(config, max_grad_norm=0)
    vary = "lora_alpha=2,1e30,1e4"
    alone = run_in_turn(config, tmp_path / "alone", vary)
    capsys.readouterr()
    result = parallel.run(config, parse([vary]), 10, on(Slurm("local"), Slurm("local")), PlainReporter())
    output = capsys.readouterr().out
    assert result.trials == alone.trials and result.best == alone.best
    assert result.trials[1].failure and f"trial 2: failed: {result.trials[1].failure}" in output
    assert output.index("trial 2: submitted") < result_at(output), "they ran at the same time"
    assert output.index("trial 3: submitted") > min(result_at(output), output.index("trial 2: failed"))

    # They share a disk, so the prepared chats exist once.
    folders = [RunFolder(config.output_dir / "chats"), *(trials.folder_of(trial, config) for trial in result.trials)]
    assert len({(each.prepared / "train.safetensors").stat().st_ino for each in folders}) == 1
    assert "prepare: done before" in folders[1].log("launched").read_text()
    assert states(folders[1])["train"] == "done"
    again = parallel.run(config, parse([vary]), 10, on(Slurm("local")), PlainReporter())
    assert again == result and "submitted" not in capsys.readouterr().out


class Stopping(PlainReporter):
    """Interrupts before the second trial is launched."""

    def doing(self, text: str) -> None:
        if text.startswith("trial 2: "):
            raise KeyboardInterrupt
        super().doing(text)


def test_a_resumed_sweep_follows_running_jobs(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    varied = parse(["seed=1,2"])
    with pytest.raises(KeyboardInterrupt):
        parallel.run(config, varied, 2, on(Slurm("local"), Slurm("local")), Stopping())
    kept = json.loads((config.output_dir / record.NAME).read_text())["trials"]
    assert [(trial["number"], trial["loss"]) for trial in kept] == [(1, None), (2, None)]
    first = trials.folder_of(record.Trial(1, {}), config)
    job = LaunchedJob.read(first).job
    capsys.readouterr()
    result = parallel.run(config, varied, 2, on(Slurm("local")), PlainReporter())
    output = capsys.readouterr().out
    assert None not in [trial.loss for trial in result.trials]
    assert "trial 1: submitted" not in output and "trial 2: submitted" in output and LaunchedJob.read(first).job == job
    assert result_at(output) < output.index("trial 2: submitted"), "it had the only launcher"


def test_a_job_that_was_cancelled_meanwhile_is_launched_again(
    config: Config, capfd: pytest.CaptureFixture[str], kolotune: Call
) -> None:
    varied = parse(["seed=1,2"])
    with pytest.raises(KeyboardInterrupt):
        parallel.run(config, varied, 2, on(Slurm("local"), Slurm("local")), Stopping())
    code, output = kolotune("cancel", config.output_dir)
    assert code == 0 and output.count("stopped: job") == 1, output
    result = parallel.run(config, varied, 1, on(Slurm("local")), PlainReporter())
    assert "trial 1: is launched again" in capfd.readouterr().out
    assert [trial.loss is None for trial in result.trials] == [False, False]


def test_a_launcher_that_refuses_is_not_used(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = Ssh(("nobody.invalid",))
    result = parallel.run(config, parse(["seed=1"]), 1, on(nowhere, Slurm("local")), PlainReporter())
    output = capsys.readouterr().out
    assert result.best is not None and "warning: trial 1: nobody.invalid: " in output
    with pytest.raises(LaunchError, match=r"nobody\.invalid"):
        parallel.run(dataclasses.replace(config, output_dir=config.output_dir / "2"), parse(["seed=1"]), 1,
                   on(nowhere, nowhere), PlainReporter())  # fmt: skip


def test_differently_prepared_chats_are_a_problem(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = trials.start(config, parse(["seed=1"]), 1, PlainReporter(), elsewhere=True)
    trial = sweep.next_trial()
    assert trial is not None
    folder = trials.folder_of(trial, config)
    running = parallel._ParallelSweep(sweep, on(Slurm("local")), PlainReporter())
    trials.share_chats(sweep.chats, folder)
    assert "metrics" in running._problem_of_results(trial)
    known = json.loads(folder.record("prepare").read_text())
    del known["sha256"]
    known["outputs"][".kolotune/prepared"]["sha256"] = "0" * 64
    folder.record("prepare").write_text(json.dumps(known))
    assert "prepared differently" in running._problem_of_results(trial)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with ssh_server(tmp_path / "ssh") as running:
        yield running


@pytest.mark.slow
@pytest.mark.skipif(bool(no_ssh()), reason=no_ssh())
def test_on_two_machines_by_ssh(
    kolotune: Call, config: Config, server: Server, tmp_path: Path, tiny_base: Path, one_thread: None
) -> None:
    alone = run_in_turn(config, tmp_path / "alone", "learning_rate=1e-3,1e-2")
    place = ["--on", "ssh", "--host", server.name, "--host", ALIAS, "--ssh-config", server.config]
    place += ["--python", sys.executable, "--remote-folder", tmp_path / "far"]
    code, output = kolotune(*line(config, tiny_base), *place, "--submit")
    assert code == 0, output
    kept = json.loads((config.output_dir / record.NAME).read_text())["trials"]
    assert kept == [dataclasses.asdict(trial) for trial in alone.trials]
    folders = [RunFolder(config.output_dir / f"trial-00{number}") for number in (1, 2)]
    used = [LaunchedJob.read(each).options["hosts"] for each in folders]
    assert sorted(used) == sorted([[server.name], [ALIAS]]), "each used a separate machine"
    assert output.index("trial 2: started on") < result_at(output)
    assert "Trials, the best first" in output and "fetched to" in output and str(tmp_path / "far") not in output
    assert folders[1].gguf.is_file() and not folders[0].gguf.exists(), "it was finished where it was trained"
    assert "will run" not in kolotune("status", folders[1].root)[1]


def line(config: Config, base: Path) -> list[Any]:
    """Return the sweep of `config` as a command line."""
    options = ["--base-model", base, "--dtype", "fp32", "--compile", "off", "--epochs", "1", "--lora-rank", "2"]
    more = ["--eval-split", "0.3", "--no-compare", "--quantization", "none", "--output-dir", config.output_dir]
    return ["sweep", *config.train_data, *options, *more, "--vary", "learning_rate=1e-3,1e-2"]


@pytest.mark.slow
@pytest.mark.skipif(bool(NO_SLURM), reason=NO_SLURM)
def test_on_a_real_slurm(config: Config, tiny_base: Path, tmp_path: Path) -> None:
    alone = run_in_turn(config, tmp_path / "alone", "learning_rate=1e-3,1e-2")
    with hosts.two_hosts() as both, slurm_cluster(both) as cluster:
        argv = [sys.executable, "-m", "kolotune", *map(str, line(config, tiny_base)), "--on", "slurm", "--at-once", "2"]
        try:
            output = cluster.run(*argv, "--submit")
        except subprocess.CalledProcessError as error:
            pytest.fail(f"{error.stdout}\n{error.stderr}")
    kept = json.loads((config.output_dir / record.NAME).read_text())["trials"]
    assert kept == [dataclasses.asdict(trial) for trial in alone.trials]
    assert output.index("trial 2: submitted") < result_at(output)
    folders = [RunFolder(config.output_dir / name) for name in ("chats", "trial-001", "trial-002")]
    assert len({(each.prepared / "train.safetensors").stat().st_ino for each in folders}) == 1
    assert folders[2].gguf.is_file()
