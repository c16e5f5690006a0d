"""A clock that is a day off and jumps, and files with equal times: only contents and step numbers matter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.runs import losses, results

from faults.workspace import Workspace, reported_stages

_DAY = 86400
_COMPILER = shutil.which("cc")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not _COMPILER or sys.platform != "linux", reason="needs Linux and a C compiler"),
]


@dataclass(frozen=True)
class Clock:
    """The clock of `support/moved_clock.c`, and runs whose processes all use it.

    libfaketime can't be used: with an unchanged monotonic clock its sleep fails (0.9.10), and a monotonic clock that
    jumps is not a realistic fault.
    """

    workspace: Workspace
    root: Path

    @classmethod
    def make(cls, workspace: Workspace, root: Path) -> Clock:
        source = Path(__file__).parent.parent / "support" / "moved_clock.c"
        assert _COMPILER is not None
        subprocess.run([_COMPILER, "-shared", "-fPIC", "-O1", "-o", root / "moved_clock.so", source], check=True)
        (root / "clock").write_bytes(struct.pack("q", 0))
        return cls(workspace, root)

    def set(self, days: int) -> None:
        """Set the clock, also for running processes."""
        with (self.root / "clock").open("r+b") as file:
            file.write(struct.pack("q", days * _DAY))

    def start(self, folder: Path) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "kolotune", *self.workspace.command(folder, compares=False), "--epochs", "12"]
        moved = {"LD_PRELOAD": str(self.root / "moved_clock.so"), "MOVED_CLOCK": str(self.root / "clock")}
        return subprocess.Popen(
            argv, env={**os.environ, **moved}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, folder: Path) -> str:
        """Finish a run; return its output."""
        child = self.start(folder)
        output, _ = child.communicate(timeout=500)
        assert child.returncode == 0, output
        return output


@pytest.fixture(scope="module")
def clock(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Clock:
    return Clock.make(workspace, tmp_path_factory.mktemp("clock"))


def newest(folder: Path, after: int = 0) -> int:
    """Wait for a checkpoint after step `after`; return the newest step."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        names = [path.name for path in (folder / ".kolotune" / "checkpoints").glob("step-*")]
        step = max((int(name.removeprefix("step-")) for name in names), default=0)
        if step > after:
            return step
        time.sleep(0.002)
    raise AssertionError("there is no checkpoint")


@pytest.fixture(scope="module")
def resumed(clock: Clock) -> tuple[Path, int, str]:
    """A resumed run: its clock jumped from tomorrow to yesterday between two checkpoints, then it was killed.

    The folder, the step of the newest checkpoint, and the output of the second process.
    """
    run = clock.root / "run"
    clock.set(1)
    child = clock.start(run)
    first = newest(run)
    clock.set(-1)
    newest(run, after=first + 4)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    step = newest(run)
    for path in (run / ".kolotune" / "checkpoints").glob("step-*"):
        # As the kernel would have stamped them: the newest seems two days older than the others.
        stamp = time.time() + (-_DAY if path.name == f"step-{step:08d}" else _DAY)
        for file in [path, *path.iterdir()]:
            os.utime(file, (stamp, stamp))
    return run, step, clock.run(run)


def test_a_clock_that_jumps_changes_nothing(clock: Clock, resumed: tuple[Path, int, str]) -> None:
    run, step, output = resumed
    assert f"resuming from step {step}" in output
    assert "prepare" not in reported_stages(output)[0]
    clock.set(0)
    whole = clock.root / "whole"
    clock.run(whole)
    assert results(run) == results(whole)
    assert losses(run / "metrics.jsonl") == losses(whole / "metrics.jsonl")
    times = [json.loads(line)["time"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert max(times) - times[-1] > 1.9 * _DAY, "the clock did not jump"


def test_only_contents_decide_which_stages_run(clock: Clock, resumed: tuple[Path, int, str]) -> None:
    run = resumed[0]
    before = results(run)
    clock.set(2)
    for path in [run, *run.rglob("*")]:
        os.utime(path, ns=(10**18, 10**18))
    assert reported_stages(clock.run(run))[0] == set()
    clock.set(-1)
    (weights,) = (run / "merged_model").glob("*.safetensors")
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(weights, ns=(10**18, 10**18))
    assert results(run) != before
    assert reported_stages(clock.run(run))[0] == {"merge"}
    assert results(run) == before
