"""Prepared tokens of 5 GB train in little memory: what is not read stays on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support.training import VOCABULARY

from kolotune.engines.events import StepDone, event_in
from kolotune.engines.job import TrainJob

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc"),
]
LENGTH, CHATS, STEPS = 400, 2_500_000, 4
"""Tokens of a chat, chats (4 bytes a token, and one for its label: 5 GB), and steps that are trained."""
MOST_MEGABYTES = 1000


def _write(path: Path, chats: int) -> None:
    """Write random chats in the format of the prepare stage, some thousands at a time."""
    sizes = {"ids": ("I32", LENGTH * chats, 4), "labelled": ("U8", LENGTH * chats, 1), "offsets": ("I64", chats + 1, 8)}
    header, offset = {}, 0
    for name, (kind, count, width) in sizes.items():
        header[name] = {"dtype": kind, "shape": [count], "data_offsets": [offset, offset + count * width]}
        offset += count * width
    dice, block = np.random.default_rng(3), 10_000
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for first in range(0, chats, block):
            count = LENGTH * min(block, chats - first)
            file.write(dice.integers(0, VOCABULARY, count, dtype=np.int32).tobytes())
        for first in range(0, chats, block):
            file.write(np.ones(LENGTH * min(block, chats - first), np.uint8).tobytes())
        file.write((np.arange(chats + 1, dtype=np.int64) * LENGTH).tobytes())


def _peak_megabytes(job: TrainJob) -> list[float]:
    """Train some steps; return the peak memory of each process, with pages of mapped files."""
    file = Path(job.metrics).parent / "job.json"
    job.write(file)
    child = subprocess.Popen(
        [sys.executable, "-m", "kolotune.engines.native", str(file)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    output = []
    try:
        for line in child.stdout:
            output.append(line)
            if isinstance(event := event_in(line), StepDone) and event.step == STEPS:
                break
        else:
            raise AssertionError("".join(output[-20:]))
        trainers = psutil.Process(child.pid).children() if job.nproc > 1 else [psutil.Process(child.pid)]
        return [_peak(process.pid) for process in trainers]
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _peak(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("processes", [1, 2])
def test_tokens_that_are_larger_than_memory_would_be(processes: int, make_training: Callable[..., Any]) -> None:
    training = make_training("llama", chats=80, held_out=0)
    options = {"nproc": processes, "batch_size": 8, "epochs": 1}
    small = _peak_megabytes(training.job("small", **options))
    path = training.root / "data" / "train.safetensors"
    _write(path, CHATS)
    assert path.stat().st_size > 5e9
    try:
        large = _peak_megabytes(training.job("large", **options))
    finally:
        path.unlink()
    print(f"small {small} MB, large {large} MB")
    assert len(large) == processes
    assert max(large) - min(small) < MOST_MEGABYTES
