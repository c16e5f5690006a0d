"""Separate file systems for tests, where mounting is allowed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a folder: ``mount("-t", "tmpfs", …)``; skip the test where that is not allowed."""
    mounted: list[Path] = []

    def do(*arguments: str) -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        if shutil.which("mount") is None:
            pytest.skip("there is no mount")
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield do
    for folder in reversed(mounted):
        # Lazily: the test may still map a file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tmpfs(mount: Callable[..., Path], size: str, *more: str) -> Path:
    """Mount a file system in memory with a size and more options, such as ``nr_inodes=9``."""
    return mount("-t", "tmpfs", "-o", ",".join([f"size={size}", *more]), "tmpfs")
