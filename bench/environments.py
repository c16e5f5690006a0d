"""Environments of the peers, made in the cache on first use from the pinned lists in `bench/peers`."""

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
_MARKER = "bench.sha256"  # written last: without it, the environment is incomplete


def ensure(name: str) -> Path:
    """Return the ``bin`` folder of a peer's environment ("trl" or "soup"), making it if needed."""
    requirements = PEERS / f"{name}.txt"
    folder = Path(platformdirs.user_cache_dir("kolotune-bench", appauthor=False), name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    with FileLock(folder.with_name(f".{name}.lock")):
        marker = folder / _MARKER
        if not marker.is_file() or marker.read_text(encoding="ascii") != digest:
            print(f"making the environment of {name} (only once)", flush=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
            subprocess.run([*pip, "--requirement", str(requirements)], check=True)
            marker.write_text(digest, encoding="ascii")
    return folder / "bin"


def ensure_torchtune() -> Path:
    """Return the ``bin`` folder of torchtune's environment, which kolotune's engine uses too."""
    return torchtune.ensure(print).folder / "bin"


def versions(programs: Path, *packages: str) -> dict[str, str]:
    """Return the versions of packages in a peer's environment."""
    program = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    answer = subprocess.run(
        [str(programs / "python"), "-I", "-c", program, *packages], capture_output=True, text=True, check=True
    )
    loaded: dict[str, str] = json.loads(answer.stdout)
    return loaded
