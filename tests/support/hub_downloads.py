"""Resolve base models against a hub on this machine, each time in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ASK = """
import json, sys, time
from kolotune.base_models import lookup
from kolotune.foundation.errors import KolotuneError
from kolotune.foundation.reporter import JsonReporter
for name in sys.argv[2:]:
    clock = time.monotonic()
    try:
        answer = {"folder": str(lookup.resolve(name, sys.argv[1] or None, JsonReporter()))}
    except KolotuneError as error:
        answer = {"kind": type(error).__name__, "code": error.exit_code, "cause": error.cause, "hint": error.hint}
    answer["is_there"] = lookup.locate(name) is not None
    print("answer", json.dumps({**answer, "name": name, "seconds": time.monotonic() - clock}))
"""


def start(endpoint: str, cache: Path, *names: str, token_file: str = "", **env: str) -> subprocess.Popen[str]:
    """Start a process that resolves the models `names`, one after the other."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    more = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    argv = [sys.executable, "-c", _ASK, token_file, *names]
    return subprocess.Popen(
        argv, env={**clean, **more, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def answers(child: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """Wait for a process that `start` returned; return its answer for each name, and everything it printed."""
    output, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    found = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("answer ")]
    return {each["name"]: each for each in found}, output + errors


def ask(endpoint: str, cache: Path, *names: str, token_file: str = "", **env: str) -> tuple[dict[str, Any], str]:
    """Call `start`, then `answers`."""
    return answers(start(endpoint, cache, *names, token_file=token_file, **env))
