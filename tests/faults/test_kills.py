"""A short form of the long part: some random kills of whole runs, and some at system calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults import calls

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks")
_PROGRAM = Path(__file__).parent


@pytest.mark.slow
def test_random_kills(tmp_path: Path) -> None:
    measured = _measure("kills", tmp_path, "--count", "8")
    assert measured["kills"] == 8 and measured["runs"] >= 1 and measured["broken"] == []
    assert measured["groups"] + measured["alone"] + measured["children"] == sum(measured["by_stage"].values()) == 8
    assert "| 8: " in (tmp_path / "page.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(bool(calls.skip_reason()), reason=calls.skip_reason() or "-")
def test_kills_at_system_calls(tmp_path: Path) -> None:
    stages = ("prepare", "train", "modelfile")
    measured = _measure("calls", tmp_path, "--every", "12", *(f"--stage={name}" for name in stages))
    assert set(measured) == set(stages)
    for stage in measured.values():
        assert stage["points"] > 1 and stage["killed"] == stage["points"]


@pytest.mark.slow
def test_a_run_is_killed_until_it_finishes(tmp_path: Path) -> None:
    measured = _measure("loop", tmp_path, "--subject=tiny", "--times=2", file="loop-tiny")
    assert measured["times"] == 2 and measured["steps"] == 36 and measured["kills"] == sum(measured["stages"].values())
    assert measured["again"] <= measured["interval"] * measured["kills"]


def _measure(what: str, folder: Path, *more: str, file: str = "") -> dict[str, Any]:
    argv = [sys.executable, str(_PROGRAM), what, "--page", str(folder / "page.md"), *more]
    done = subprocess.run(
        argv, env={**os.environ, "KOLOTUNE_TEST_CACHE": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    loaded: dict[str, Any] = json.loads((folder / "faults" / f"{file or what}.json").read_text(encoding="utf-8"))
    return loaded
