"""The peers' environments: each in the cache, made the first time from its pinned list in `bench/peers`."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import platformdirs
from filelock import FileLock

from kolotune.engines.torchtune import environment as torchtune

PEERS = Path(__file__).resolve().parent / "peers"
_MARKER = "bench.sha256"  # written last: an environment without it is not whole


def ensure(name: str) -> Path:
    """The folder ``bin`` of a peer's environment ("trl" or "soup")."""
    requirements = PEERS / f"{name}.txt"
    folder = Path(platformdirs.user_cache_dir("kolotune-bench", appauthor=False), name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    with FileLock(folder.with_name(f".{name}.lock")):
        marker = folder / _MARKER
        if not marker.is_file() or marker.read_text(encoding="ascii") != wanted:
            print(f"making {name}'s environment, once", flush=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
            subprocess.run([*pip, "--requirement", str(requirements)], check=True)
            marker.write_text(wanted, encoding="ascii")
    return folder / "bin"


def ensure_torchtune() -> Path:
    """The folder ``bin`` of torchtune's environment: that of kolotune's engine."""
    return torchtune.ensure(print).folder / "bin"


def versions(programs: Path, *packages: str) -> dict[str, str]:
    """Versions of packages of a peer's environment."""
    program = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    found = subprocess.run(
        [str(programs / "python"), "-I", "-c", program, *packages], capture_output=True, text=True, check=True
    )
    loaded: dict[str, str] = json.loads(found.stdout)
    return loaded
