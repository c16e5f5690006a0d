"""The program on each machine of a job, as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import kolotune
from kolotune.foundation.errors import RunFolderError
from kolotune.launching.node import MODULE
from kolotune.launching.node_task import NodeTask, _run_verb, _was_started
from kolotune.run_folder.layout import RunFolder
from kolotune.version import VERSION

SOURCE = str(Path(kolotune.__file__).parents[1])
HOME = {**os.environ, "PYTHONPATH": SOURCE}


def node(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the module; return its exit code and events."""
    argv = [sys.executable, "-P", "-m", MODULE, *arguments]
    done = subprocess.run(argv, env=HOME, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_first_machine_does_the_run_and_the_others_train_with_it() -> None:
    job = NodeTask("/c.yaml", "/out", 3, "a:1", token_file="/token", python="py")
    (run,) = job.commands(0)
    assert run == ["py", "-P", "-m", "kolotune", "run", "--config", "/c.yaml", "--output-dir", "/out", "--nnodes", "3",
                   "--rdzv", "a:1", "--hf-token", "/token", "--json"]  # fmt: skip
    prepare, train = job.commands(2, resumes=True)
    assert prepare[4] == "prepare" and train[4] == "train"
    assert prepare[8] == train[5] == "/out/.kolotune/machines/2", "machines may share a disk"
    assert "--use-checkpoint" in train and "--use-checkpoint" not in prepare
    alone = NodeTask("/c.yaml", "/out").commands(0)
    only_train = NodeTask("/c.yaml", "/out", only_train=True)
    prepare, train = only_train.commands(0, resumes=True)
    assert (prepare[4], prepare[8], train[4], train[5]) == ("prepare", "/out", "train", "/out")
    assert "--use-checkpoint" in train and "--only-train" in only_train.arguments(0)
    assert len(alone) == 1 and not {"--nnodes", "--rdzv", "--hf-token"} & set(alone[0])


def test_a_machine_knows_whether_it_was_restarted(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [_was_started(folder, job) for job in ("1", "1", "2", "2", "1")] == [False, True, False, True, False]
    assert [_was_started(folder, "") for _ in range(2)] == [False, False], "a job without a name is always new"


def test_about(tmp_path: Path) -> None:
    assert node("about", str(tmp_path)) == (0, [{"version": VERSION, "root": str(tmp_path)}])
    assert node("about", "runs")[1][0]["root"] == str(Path.cwd() / "runs")


def test_the_exit_code_is_the_last_event(tmp_path: Path) -> None:
    job = NodeTask(str(tmp_path / "none.yaml"), str(tmp_path / "out"))
    code, events = node("run", *job.arguments(0))
    assert code == 2
    assert [event["event"] for event in events] == ["failure", "ended"] and events[-1]["code"] == 2
    assert "none.yaml" in events[0]["cause"]
    assert "none.yaml" in RunFolder(tmp_path / "out").log("launched").read_text(), "the log has it, too"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, 137)])
def test_the_exit_code_after_a_signal(number: int, code: int, tmp_path: Path) -> None:
    program = f"import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})"
    assert _run_verb([sys.executable, "-c", program], RunFolder(tmp_path)) == code


def test_a_started_task_can_be_watched_from_any_byte(tmp_path: Path) -> None:
    state = f"--state={tmp_path / 'state'}"
    job = NodeTask(str(tmp_path / "none.yaml"), str(tmp_path / "out"))
    assert node("start", state, *job.arguments(0))[0] == 0
    code, events = node("watch", state)
    assert code == 0 and [event["event"] for event in events] == ["failure", "ended"]
    whole = (tmp_path / "state" / "0.log").read_bytes()
    begin = whole.index(b"\n") + 1
    assert [event["event"] for event in node("watch", state, f"--begin={begin}")[1]] == ["ended"]
    assert node("stop", state)[0] == 0, "stopping an ended task does nothing"


def test_one_task_at_a_time_and_it_can_be_stopped(tmp_path: Path) -> None:
    """The task waits for a machine that does not exist."""
    state = f"--state={tmp_path / 'state'}"
    job = NodeTask(str(tmp_path / "c.yaml"), str(tmp_path / "out"), 2, "nobody.invalid:1")
    assert node("start", state, *job.arguments(0))[0] == 0
    code, events = node("start", state, *job.arguments(0))
    assert code == RunFolderError.exit_code and str(tmp_path / "out") in events[-1]["cause"]
    started = time.monotonic()
    assert node("stop", state)[0] == 0
    assert time.monotonic() - started < 300
    assert node("watch", state)[1][-1] == {"event": "ended", "code": 130}
    assert node("start", state, *job.arguments(0))[0] == 0, "it can start again"
    assert node("stop", state)[0] == 0


@pytest.mark.parametrize("arguments", [["run"], ["start", "--config=c", "--output-dir=o"], ["nonsense"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", MODULE, *arguments], env=HOME, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
