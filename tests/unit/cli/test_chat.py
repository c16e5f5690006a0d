"""`chat` in a terminal: Ctrl-C ends an answer, a termination signal the program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kolotune.foundation.config import Config

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


class Terminal:
    """The verb in a process; its standard output is read up to a text."""

    def __init__(self, run: Path, folder: Path) -> None:
        argv = [sys.executable, "-P", "-m", "kolotune", "chat", str(run), "--max-tokens", "3000", "--seed", "3"]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)

    def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def read(self, end: bytes = b"", count: int = 0) -> bytes:
        assert self.process.stdout is not None
        seen = b""
        while not (end and seen.endswith(end)) and not (count and len(seen) >= count):
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, seen
            seen += byte
        return seen


@pytest.mark.parametrize("last", [signal.SIGTERM, None])
def test_an_answer_can_be_interrupted(last: signal.Signals | None, finished: Config, tmp_path: Path) -> None:
    terminal = Terminal(finished.output_dir, tmp_path)
    terminal.read(b"> ")
    for _ in range(2):
        terminal.write("hi\n")
        terminal.read(count=20)
        terminal.process.send_signal(signal.SIGINT)
        terminal.read(b"\n> ")
    if last is None:
        terminal.write("\n")
    else:
        terminal.write("hi\n")
        terminal.read(count=20)
        terminal.process.send_signal(last)
    terminal.process.communicate(timeout=30)
    assert terminal.process.returncode == (0 if last is None else 130)


def test_a_rating_is_kept(finished: Config, tmp_path: Path) -> None:
    file = tmp_path / "ratings.jsonl"
    argv = [
        sys.executable, "-P", "-m", "kolotune", "chat", str(finished.output_dir), "--max-tokens", "8", "--seed", "3",
        "--ratings", str(file),
    ]  # fmt: skip
    typed = "/good\nhi\n/good\n/better Hello.\n"
    done = subprocess.run(argv, input=typed, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "there is no answer to rate yet" in done.stdout + done.stderr
    rated, pair = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    assert rated["label"] is True and rated["messages"][-2:-1] == [{"role": "user", "content": "hi"}]
    assert pair["rejected"] == rated["messages"][-1:] and pair["chosen"][0]["content"] == "Hello."
    assert pair["prompt"] == rated["messages"][:-1]
