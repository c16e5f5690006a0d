"""The client is killed or interrupted: no process is left inside, nothing is lost, the run finishes."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
from contracts import flags, write_chats
from support.docker_engine import Client, until_training
from support.runs import STAGES_WITHOUT_COMPARE, results

pytestmark = pytest.mark.container
KILLS = 20
GONE_SECONDS = 10.0


@pytest.mark.timeout(900)
def test_a_client_that_is_killed_at_random_moments(container: Client, small_base: Path, tmp_path: Path) -> None:
    """A stage that was reported as done never runs again; the results are those of an undisturbed run."""
    write_chats(tmp_path)
    options = flags("native", small_base, **{"checkpoint-steps": 2})
    command = ["run", "chats.jsonl", *options, "--use-checkpoint", "--container"]
    dice = random.Random(20)
    done: set[str] = set()
    longest, rounds = 0.0, 0
    for _ in range(KILLS):
        if len(done) == len(STAGES_WITHOUT_COMPARE):  # start over in another folder
            done, rounds = set(), rounds + 1
        folder = f"outputs{rounds}"
        child = container.start(*command, "--output-dir", folder, cwd=tmp_path)
        time.sleep(dice.uniform(0.2, 6))
        child.kill()
        output = child.communicate()[0]
        killed = time.monotonic()
        assert container.idle_within(GONE_SECONDS), output
        longest = max(longest, time.monotonic() - killed)
        ran = set(re.findall(r"^\.\.\. (\w+): ", output, re.MULTILINE))
        assert not ran & done, (ran & done, output)
        done |= set(re.findall(r"^ok  (\w+): ", output, re.MULTILINE))
    print(f"{KILLS} kills; the last process was gone after {longest:.1f} s at most")
    for number in range(rounds + 1):
        code, output = container(*command, "--output-dir", f"outputs{number}", cwd=tmp_path)
        assert code == 0, output
    code, output = container("run", "chats.jsonl", *options, "--output-dir", "undisturbed", "--container", cwd=tmp_path)
    assert code == 0, output
    for number in range(rounds + 1):
        assert results(tmp_path / f"outputs{number}") == results(tmp_path / "undisturbed")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_client_waits_and_fetches_the_records(
    how: signal.Signals, container: Client, small_base: Path, tmp_path: Path
) -> None:
    write_chats(tmp_path)
    command = ["run", "chats.jsonl", *flags("native", small_base, epochs=500), "--container"]
    child = container.start(*command, cwd=tmp_path)
    until_training(child)
    child.send_signal(how)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 130
    assert "error: stopped during train" in output and "Traceback" not in output
    assert container.idle_within(1)
    mark = json.loads((tmp_path / "outputs" / ".kolotune" / "train.unfinished.json").read_text())
    assert mark["state"] == "interrupted"
    assert (tmp_path / "outputs" / "metrics.jsonl").stat().st_size > 0
    assert not (tmp_path / "outputs" / ".kolotune" / "checkpoints").exists()


def test_a_second_interruption_kills(container: Client, small_base: Path, tmp_path: Path) -> None:
    write_chats(tmp_path)
    command = ["run", "chats.jsonl", *flags("native", small_base, epochs=500), "--container"]
    child = container.start(*command, cwd=tmp_path)
    until_training(child)
    # Stopped processes can't handle the interruption: they can only be killed.
    container.inside("/opt/kolotune/venv/bin/python", "-c", _STOP_ALL)
    child.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert child.poll() is None and container.processes()
    child.send_signal(signal.SIGINT)
    output = child.communicate(timeout=30)[0]
    assert child.returncode == 130
    assert "error: killed" in output and "Traceback" not in output
    assert container.idle_within(3)


_STOP_ALL = """
import os, pathlib, signal
for path in pathlib.Path("/proc").iterdir():
    if path.name.isdigit() and int(path.name) != os.getpid() and b"kolotune" in (path / "cmdline").read_bytes():
        if b"docker-init" not in (path / "cmdline").read_bytes():
            os.kill(int(path.name), signal.SIGSTOP)
"""


def test_a_killed_chat_leaves_no_process_behind(container: Client, small_base: Path, tmp_path: Path) -> None:
    write_chats(tmp_path)
    code, output = container("run", "chats.jsonl", *flags("native", small_base), "--container", cwd=tmp_path)
    assert code == 0, output
    child = container.start("chat", "outputs", "--container", "--max-tokens", "3", cwd=tmp_path)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("hi\n")
    child.stdin.flush()
    output = ""
    while output.count("> ") < 2:  # the answer is between two prompts, which do not end a line
        output += child.stdout.read(1)
    assert container.processes()
    child.kill()
    child.wait()
    assert container.idle_within(GONE_SECONDS)
