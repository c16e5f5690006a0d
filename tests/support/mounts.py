"""File systems of their own for tests, where mounting is allowed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a folder: ``mount("-t", "tmpfs", …)``; skips where that is not allowed."""
    made: list[Path] = []

    def do(*arguments: str) -> Path:
        place = tmp_path / f"mount{len(made)}"
        place.mkdir()
        if shutil.which("mount") is None:
            pytest.skip("there is no mount")
        done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        made.append(place)
        return place

    yield do
    for place in reversed(made):
        # Lazily: a file may still be mapped by what the test holds.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def tmpfs(mount: Callable[..., Path], size: str, *more: str) -> Path:
    """A file system in memory, of such a size; more options as ``nr_inodes=9``."""
    return mount("-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "tmpfs")
