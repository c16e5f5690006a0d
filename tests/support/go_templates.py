"""Go's own text/template, as Ollama uses it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

Renderer = Callable[[list[dict[str, Any]]], list[list[str]]]


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A function that renders templates with Go's own text/template."""
    if not shutil.which("go"):
        pytest.skip("needs Go's compiler: `go` is not on PATH")
    program = tmp_path_factory.mktemp("go") / "render"
    source = Path(__file__).parents[1] / "go" / "render.go"
    subprocess.run(["go", "build", "-o", program, source], check=True, env={**os.environ, "GO111MODULE": "off"})

    def run(jobs: list[dict[str, Any]]) -> list[list[str]]:
        completed = subprocess.run([program], input=json.dumps(jobs), capture_output=True, encoding="utf-8", check=True)
        texts: list[list[str]] = json.loads(completed.stdout)
        return texts

    return run


def job(template: str, chats: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return a job for the renderer; chats are turns with `role` and `content`."""
    return {"Template": template, "Chats": [{"messages": turns} for turns in chats]}
