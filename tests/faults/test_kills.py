"""The long part of the suite in short: some random kills of whole runs, and some at system calls."""

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
def test_runs_that_are_killed_at_random(tmp_path: Path) -> None:
    found = _measured("kills", tmp_path, "--count", "8")
    assert found["kills"] == 8 and found["runs"] >= 1 and found["broken"] == []
    assert found["groups"] + found["alone"] + found["children"] == sum(found["by_stage"].values()) == 8
    assert "| 8: " in (tmp_path / "page.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(bool(calls.why_not()), reason=calls.why_not() or "-")
def test_stages_that_are_killed_at_system_calls(tmp_path: Path) -> None:
    stages = ("prepare", "train", "modelfile")
    found = _measured("calls", tmp_path, "--every", "12", *(f"--stage={name}" for name in stages))
    assert set(found) == set(stages)
    for each in found.values():
        assert each["points"] > 1 and each["killed"] == each["points"]


@pytest.mark.slow
def test_a_run_that_is_killed_until_it_finishes(tmp_path: Path) -> None:
    found = _measured("loop", tmp_path, "--subject=tiny", "--times=2", file="loop-tiny")
    assert found["times"] == 2 and found["steps"] == 36 and found["kills"] == sum(found["stages"].values())
    assert found["again"] <= found["interval"] * found["kills"]


def _measured(what: str, folder: Path, *more: str, file: str = "") -> dict[str, Any]:
    argv = [sys.executable, str(_PROGRAM), what, "--page", str(folder / "page.md"), *more]
    done = subprocess.run(
        argv, env={**os.environ, "KOLOTUNE_TEST_CACHE": str(folder)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    loaded: dict[str, Any] = json.loads((folder / "faults" / f"{file or what}.json").read_text(encoding="utf-8"))
    return loaded
