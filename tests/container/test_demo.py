"""The demo, on the real small model: what the container makes is what this machine makes, bit for bit."""

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

# Not among those of `make test-container`: it trains twice, some minutes. `make test-all` runs it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def fetching(image: Client) -> Iterator[Client]:
    """A container of its own, which may fetch the model."""
    image.forget(NAME)
    code, output = image("container", "start", NAME, "--network", "host", *certificates(), cwd=image.folder)
    assert code == 0, output
    yield image
    image.forget(NAME)


def test_the_demo_is_the_same_in_the_container(sample_chats: Path, fetching: Client, tmp_path: Path) -> None:
    # Without a compiler in the image, as here, the step there is PyTorch's.
    chosen = ["--template-date", "2026-01-02", "--compile", "off"]
    command = ["run", "--config", str(sample_chats.parent / "kolotune.yaml"), *chosen]
    code, output = fetching(*command, "--output-dir", "inside", f"--container={NAME}", cwd=tmp_path)
    assert code == 0, output
    argv = [sys.executable, "-m", "kolotune", *command, "--output-dir", "here"]
    # What this machine has chosen for its BLAS the container does not know, and another kernel has other last bits.
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    inside, here = results(tmp_path / "inside"), results(tmp_path / "here")
    assert inside == here
    assert {"adapter/adapter_model.safetensors", "Merged.gguf", "MergedQ4_K_M.gguf"} <= set(here)
