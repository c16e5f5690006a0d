"""The demo, on the real small model: the container and this machine make the same files, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.docker_engine import Client, certificates
from support.runs import results

NAME = "kolo_demo"

# `make test-all` runs it, `make test-container` does not: it trains twice, which takes some minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def networked(image: Client) -> Iterator[Client]:
    """A separate container, which may download the model."""
    image.forget(NAME)
    code, output = image("container", "start", NAME, "--network", "host", *certificates(), cwd=image.folder)
    assert code == 0, output
    yield image
    image.forget(NAME)


def test_the_demo_is_the_same_in_the_container(sample_chats: Path, networked: Client, tmp_path: Path) -> None:
    # This image has no compiler, so training runs without compiled kernels.
    options = ["--template-date", "2026-01-02", "--compile", "off"]
    command = ["run", "--config", str(sample_chats.parent / "kolotune.yaml"), *options]
    code, output = networked(*command, "--output-dir", "inside", f"--container={NAME}", cwd=tmp_path)
    assert code == 0, output
    argv = [sys.executable, "-m", "kolotune", *command, "--output-dir", "here"]
    # The container does not know this machine's choice of a BLAS kernel, and another one gives other last bits.
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    inside, here = results(tmp_path / "inside"), results(tmp_path / "here")
    assert inside == here
    assert {"adapter/adapter_model.safetensors", "Merged.gguf", "MergedQ4_K_M.gguf"} <= set(here)
