"""The container's disk is full: before or while files are sent, before a stage, and during a stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from contracts import flags, write_chats
from support.docker_engine import Client, require_error, until_training
from support.runs import results
from support.waiting import wait_until

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


@pytest.fixture
def small_volume(image: Client, other: str, request: pytest.FixtureRequest) -> str:
    """A container whose volume is a file system in memory, mounted with these options."""
    options = {"type": "tmpfs", "device": "tmpfs", "o": f"{request.param},uid=1000,gid=1000"}
    image.api.create_volume(f"{other}_runs", driver="local", driver_opts=options)
    image.bring_up(other)
    return other


@pytest.mark.parametrize(
    ("small_volume", "verb", "phrases"),
    [
        ("size=6m", "run", ["MB of files don't fit on its volume", "where Docker keeps its"]),
        ("size=200m,nr_inodes=9", "run", ["send ", "the container's disk is full", "where Docker keeps its"]),
        ("size=12m", "prepare", ["the run needs about ", "MB are free"]),
        ("size=12m", "run", ["the disk is full", "Free some space"]),
    ],
    indirect=["small_volume"],
    ids=["for inputs", "for the number of inputs", "for results", "for checks"],
)
def test_too_little_space(
    small_volume: str, verb: str, phrases: list[str], image: Client, small_base: Path, tmp_path: Path
) -> None:
    write_chats(tmp_path)
    command = [verb, "chats.jsonl", "--base-model", small_base, f"--container={small_volume}"]
    code, output = image(*command, cwd=tmp_path)
    assert code == 13, output
    require_error(output, *phrases)
    assert ".partial" not in image.inside("find", "/runs", name=small_volume)


@pytest.mark.parametrize("small_volume", ["size=150m"], indirect=True)
def test_the_disk_fills_up_during_a_stage(small_volume: str, image: Client, small_base: Path, tmp_path: Path) -> None:
    write_chats(tmp_path)
    options = flags("native", small_base, epochs=100, **{"checkpoint-steps": 5})
    command = ["run", "chats.jsonl", *options, "--use-checkpoint", f"--container={small_volume}"]
    child = image.start(*command, cwd=tmp_path)
    until_training(child)
    checkpoint = ("find", "/runs", "-path", "*/checkpoints/step-*", "-name", "*.safetensors")
    wait_until(lambda: image.inside(*checkpoint, name=small_volume), "no checkpoint was written")
    image.inside("dd", "if=/dev/zero", "of=/runs/filler", "bs=64k", name=small_volume)
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 13, output
    require_error(output, "the disk is full", "Free some space")
    assert ".partial" not in image.inside("find", "/runs", name=small_volume)
    image.inside("rm", "/runs/filler", name=small_volume)
    code, output = image(*command, cwd=tmp_path)
    assert code == 0, output
    assert "prepare: done before" in output and "resuming from step" in output, output
    finished = results(tmp_path / "outputs")
    command = ["run", "chats.jsonl", *options, "--output-dir", "undisturbed", f"--container={small_volume}"]
    code, output = image(*command, cwd=tmp_path)
    assert code == 0, output
    assert results(tmp_path / "undisturbed") == finished
