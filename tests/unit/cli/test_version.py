"""`version`, `--version`, and the completion of a shell."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kolotune.foundation import installation
from kolotune.version import VERSION

Call = Callable[..., tuple[int, str]]
PROGRAM = [sys.executable, "-m", "kolotune"]


def test_version_names_what_is_installed(kolotune: Call) -> None:
    code, output = kolotune("version")
    rows = dict(line.split(maxsplit=1) for line in output.splitlines()[2:])
    assert code == 0
    assert rows["kolotune"] == VERSION and rows["python"] == platform.python_version()
    assert rows["torch"] == importlib.metadata.version("torch")
    assert rows["bitsandbytes"] == "not installed"


def test_version_for_programs(kolotune: Call) -> None:
    code, output = kolotune("version", "--json")
    event = json.loads(output)
    assert (code, event["event"], event["text"], event["platform"]) == (0, "result", VERSION, platform.platform())
    packages = event["packages"]
    assert packages["transformers"] == importlib.metadata.version("transformers")
    assert packages["bitsandbytes"] is None
    assert packages["llama.cpp converter"] == installation.CONVERTER_VERSION


def test_the_flag_prints_one_line_and_does_nothing_else(kolotune: Call) -> None:
    assert kolotune("--version") == (0, f"kolotune {VERSION}\n")
    assert kolotune("--version", "run", "no.jsonl") == (0, f"kolotune {VERSION}\n")


def test_versions_are_read_without_loading_the_packages() -> None:
    code = (
        "import sys; from kolotune.cli import run_command_line; run_command_line(['version', '--json']);"
        "print(sorted({'torch', 'transformers', 'xllamacpp', 'numpy', 'pyarrow', 'ollama'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("typed", "word", "expected"),
    [("kolotune ver", 1, "verify version"), ("kolotune run --warm", 2, "--warmup-steps"), ("kolotune no", 1, "")],
)
def test_bash_completes_verbs_and_options(typed: str, word: int, expected: str) -> None:
    asked = {"_KOLOTUNE_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(word)}
    done = subprocess.run(PROGRAM, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == expected.split()


def test_completion_installs_for_the_shell_that_asks(tmp_path: Path) -> None:
    script = f"{' '.join(PROGRAM)} --install-completion; exit $?"
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    written = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file())
    assert "_KOLOTUNE_COMPLETE=complete_bash" in written
