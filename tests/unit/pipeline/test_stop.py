"""Runs that are stopped or killed: nothing is lost, and the next run continues."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
from support.runs import hashes, partials, states

from kolotune.foundation import config as configs
from kolotune.run_folder.layout import RunFolder

needs_posix = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")


def start_training(run: RunFolder, *more: str, epochs: int = 2000) -> subprocess.Popen[str]:
    """Start a training that would take minutes; return in its third step or later."""
    program = [sys.executable, "-m", "kolotune", "run", "--config", str(run.config), "--output-dir", str(run.root)]
    argv = [*program, "--epochs", str(epochs), "--scheduler-type", "constant", "--warmup-steps", "0", *more]
    log = (run.root.parent / "output").open("w")
    run.metrics.unlink(missing_ok=True)
    process = subprocess.Popen(argv, stdout=log, stderr=log, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (run.metrics.is_file() and run.metrics.read_text().count('"loss"') >= 3):
        assert process.poll() is None, (run.root.parent / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def stop(process: subprocess.Popen[str], run: RunFolder, *numbers: int) -> str:
    """Send signals; return what was printed. All processes must have ended."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(0.05)
    assert process.wait(20) == 130
    assert not psutil.wait_procs(family, timeout=20)[1]
    return (run.root.parent / "output").read_text()


@needs_posix
def test_a_stopped_training_is_shown_and_resumes(run_copy: RunFolder, kolotune: Any, monkeypatch: Any) -> None:
    token = "hf_PlantedTokenThatMustNotBeSeen"
    monkeypatch.setenv("HF_TOKEN", token)
    before = hashes(run_copy)
    printed = stop(start_training(run_copy, "--checkpoint-steps", "1"), run_copy, signal.SIGTERM)
    assert "error: stopped during train" in printed
    assert "--use-checkpoint" in printed
    assert "Traceback" not in printed
    assert states(run_copy)["train"] == "interrupted"
    assert hashes(run_copy) == before  # the adapter of the run before is still there
    assert partials(run_copy) == []
    done = json.loads(run_copy.metrics.read_text().splitlines()[-1])["step"]
    code, output = kolotune("train", run_copy.root, "--epochs", str(done + 3), "--use-checkpoint")
    assert code == 0, output
    assert "resuming from step" in output
    steps = [json.loads(line)["step"] for line in run_copy.metrics.read_text().splitlines()]
    assert steps == list(range(1, done + 4))
    assert states(run_copy)["train"] == "done"
    assert token not in printed + output
    assert not [path for path in run_copy.root.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]


@needs_posix
@pytest.mark.slow
@pytest.mark.parametrize("numbers", [(2,), (15, 15), (2, 2, 2), (2, 15)])
def test_one_or_several_signals_end_all_processes(run_copy: RunFolder, kolotune: Any, numbers: tuple[int, ...]) -> None:
    printed = stop(start_training(run_copy), run_copy, *numbers)
    assert "Traceback" not in printed
    assert "error: stopped" in printed
    assert states(run_copy)["train"] == "interrupted"
    code, _ = kolotune("run", "--config", run_copy.config, "--epochs", "1")
    assert code == 0
    assert set(states(run_copy).values()) == {"done"}


@needs_posix
@pytest.mark.slow
def test_after_a_kill_the_next_run_makes_the_same(run_copy: RunFolder, kolotune: Any) -> None:
    before = hashes(run_copy)
    process = start_training(run_copy)
    family = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *family):
        os.kill(each.pid, signal.SIGKILL)
    process.wait()
    assert states(run_copy)["train"] == "interrupted"
    shutil.rmtree(run_copy.adapter)
    # The saved options are those of the killed run; the first run's are given instead.
    flags = ["--epochs", "1", "--scheduler-type", "cosine"]
    saved = configs.load_file(run_copy.config)
    saved.pop("warmup_steps")
    run_copy.config.write_text(configs.dump(configs.resolve((saved, "saved", run_copy.root))))
    assert kolotune("run", "--config", run_copy.config, *flags)[0] == 0
    assert hashes(run_copy) == before
