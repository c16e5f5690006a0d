"""The wheel in an environment of its own: the client works, and what needs more says so before it does anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kolotune.cli.app import GROUPS
from kolotune.foundation.errors import ToolchainError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``kolotune`` program of an environment that has the wheel and what it depends on, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", folder, str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", wheel], check=True)
    return folder / "venv" / "bin" / "kolotune"


def call(client: Path, *arguments: str, cwd: Path) -> tuple[int, str]:
    """The exit code and output of the client."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([client, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


ARGUMENTS = {
    "check": ["chats.jsonl"], "plan": ["chats.jsonl"], "run": ["chats.jsonl"], "prepare": ["chats.jsonl"],
    "sweep": ["chats.jsonl", "--vary", "lora_rank=8,16"], "export": ["folder"], "rebuild": ["manifest.json"],
    "push": ["outputs", "owner/name", "--what", "gguf"],
}  # fmt: skip


def test_what_needs_more_than_the_client_says_so_first(client: Path, tmp_path: Path) -> None:
    """The same words and exit code for every verb, and nothing is written."""
    verbs = [verb.name for verbs in GROUPS.values() for verb in verbs if not verb.client]
    assert len(verbs) > 10
    for verb in verbs:
        code, output = call(client, verb, *ARGUMENTS.get(verb, []), cwd=tmp_path)
        assert code == ToolchainError.exit_code, f"{verb}: {output}"
        assert f"{verb} needs the full installation" in output and "torch" in output and "pip install" in output
        assert list(tmp_path.iterdir()) == []


def test_the_client_works_alone(client: Path, tmp_path: Path) -> None:
    assert call(client, "--help", cwd=tmp_path)[0] == 0
    assert call(client, "init", cwd=tmp_path)[0] == 0
    assert (tmp_path / "chats.jsonl").is_file()
    assert call(client, "models", cwd=tmp_path)[0] == 0
    assert call(client, "runs", cwd=tmp_path)[0] == 0
    code, output = call(client, "doctor", "--json", cwd=tmp_path)
    assert code == 1  # what training needs is missing
    rows = {row["part"]: row for row in json.loads(output.splitlines()[0])["rows"]}
    assert rows["torch"]["state"] == "missing" and "pip install" in rows["torch"]["what"]
    code, output = call(client, "status", "outputs", cwd=tmp_path)
    assert code == 12 and "outputs" in output, output
