"""Jobs for tests of launchers, and a reporter that keeps the lines it shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kolotune.foundation import config as configs
from kolotune.launching.job_output import SilentReporter
from kolotune.launching.launcher import LATER, JobSpec


def job_spec(folder: Path, machines: int = 1, rdzv: str = LATER, **more: object) -> JobSpec:
    """Return a job named ``job-1`` that trains on one empty chat."""
    chats = folder / "chats.jsonl"
    if not chats.exists():
        chats.write_text("{}\n")
    options = {"train_data": chats, "nnodes": machines, "rdzv": rdzv, "output_dir": folder / "out"}
    return JobSpec(configs.resolve((options, "test", folder)), "job-1", 1.5, **more)  # type: ignore[arg-type]


class Notebook(SilentReporter):
    """Keeps the lines that are shown, and calls a function with each."""

    def __init__(self, on_line: Callable[[str], None] = lambda text: None) -> None:
        self.lines: list[str] = []
        self._on_line = on_line

    def _line(self, text: str) -> None:
        self.lines.append(text.strip())
        self._on_line(text)

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        self._line(f"{exit_code} {cause}")
