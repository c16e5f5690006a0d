"""What each machine of a job does, by the real processes."""

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
from kolotune.launching.node import MODULE, Node, _run, _was_here
from kolotune.run_folder.layout import RunFolder
from kolotune.version import VERSION

SOURCE = str(Path(kolotune.__file__).parents[1])
HOME = {**os.environ, "PYTHONPATH": SOURCE}


def node(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Calls the module; its exit code, and the events that it printed."""
    argv = [sys.executable, "-P", "-m", MODULE, *arguments]
    done = subprocess.run(argv, env=HOME, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=500)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_first_does_the_run_and_others_train_with_it() -> None:
    job = Node("/c.yaml", "/out", 3, "a:1", token_file="/token", python="py")
    (run,) = job.commands(0)
    assert run == ["py", "-P", "-m", "kolotune", "run", "--config", "/c.yaml", "--output-dir", "/out", "--nnodes", "3",
                   "--rdzv", "a:1", "--hf-token", "/token", "--json"]  # fmt: skip
    prepare, train = job.commands(2, again=True)
    assert prepare[4] == "prepare" and train[4] == "train"
    assert prepare[8] == train[5] == "/out/.kolotune/machines/2", "machines may share a disk"
    assert "--use-checkpoint" in train and "--use-checkpoint" not in prepare
    alone = Node("/c.yaml", "/out").commands(0)
    only = Node("/c.yaml", "/out", only_train=True)
    prepare, train = only.commands(0, again=True)
    assert (prepare[4], prepare[8], train[4], train[5]) == ("prepare", "/out", "train", "/out")
    assert "--use-checkpoint" in train and "--only-train" in only.arguments(0)
    assert len(alone) == 1 and not {"--nnodes", "--rdzv", "--hf-token"} & set(alone[0])


def test_a_machine_knows_whether_it_comes_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert [_was_here(folder, job) for job in ("1", "1", "2", "2", "1")] == [False, True, False, True, False]
    assert [_was_here(folder, "") for _ in range(2)] == [False, False], "without a name nothing is known"


def test_about(tmp_path: Path) -> None:
    assert node("about", str(tmp_path)) == (0, [{"version": VERSION, "root": str(tmp_path)}])
    assert node("about", "runs")[1][0]["root"] == str(Path.cwd() / "runs")


def test_how_it_ended_is_the_last_that_is_said(tmp_path: Path) -> None:
    job = Node(str(tmp_path / "none.yaml"), str(tmp_path / "out"))
    code, events = node("run", *job.arguments(0))
    assert code == 2
    assert [each["event"] for each in events] == ["failure", "ended"] and events[-1]["code"] == 2
    assert "none.yaml" in events[0]["cause"]
    assert "none.yaml" in RunFolder(tmp_path / "out").log("launched").read_text(), "it is in the log, too"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, 137)])
def test_an_end_by_a_signal_has_a_code_of_its_own(number: int, code: int, tmp_path: Path) -> None:
    program = f"import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})"
    assert _run([sys.executable, "-c", program], RunFolder(tmp_path)) == code


def test_one_that_is_started_is_watched_from_any_byte(tmp_path: Path) -> None:
    state = f"--state={tmp_path / 'state'}"
    job = Node(str(tmp_path / "none.yaml"), str(tmp_path / "out"))
    assert node("start", state, *job.arguments(0))[0] == 0
    code, events = node("watch", state)
    assert code == 0 and [each["event"] for each in events] == ["failure", "ended"]
    whole = (tmp_path / "state" / "0.log").read_bytes()
    begin = whole.index(b"\n") + 1
    assert [each["event"] for each in node("watch", state, f"--begin={begin}")[1]] == ["ended"]
    assert node("stop", state)[0] == 0, "what has ended is stopped"


def test_one_at_a_time_and_it_can_be_stopped(tmp_path: Path) -> None:
    """It waits for the name of the machine where they meet, which nobody has."""
    state = f"--state={tmp_path / 'state'}"
    job = Node(str(tmp_path / "c.yaml"), str(tmp_path / "out"), 2, "nobody.invalid:1")
    assert node("start", state, *job.arguments(0))[0] == 0
    code, events = node("start", state, *job.arguments(0))
    assert code == 12 and "is at work" in events[-1]["cause"]
    begun = time.monotonic()
    assert node("stop", state)[0] == 0
    assert time.monotonic() - begun < 300
    assert node("watch", state)[1][-1] == {"event": "ended", "code": 130}
    assert node("start", state, *job.arguments(0))[0] == 0, "and started again"
    assert node("stop", state)[0] == 0


@pytest.mark.parametrize("arguments", [["run"], ["start", "--config=c", "--output-dir=o"], ["nonsense"]])
def test_what_is_missing_is_said(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-P", "-m", MODULE, *arguments], env=HOME, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
