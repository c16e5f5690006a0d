"""The container's disk is full: before anything is sent, while it is sent, before a stage, and in mid-stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from contracts import flags, write_chats
from support.docker_engine import Client, told, until_training
from support.runs import results

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]


@pytest.fixture
def narrow(image: Client, other: str, request: pytest.FixtureRequest) -> str:
    """A container whose volume is a file system in memory with these options."""
    options = {"type": "tmpfs", "device": "tmpfs", "o": f"{request.param},uid=1000,gid=1000"}
    image.api.create_volume(f"{other}_runs", driver="local", driver_opts=options)
    image.bring_up(other)
    return other


@pytest.mark.parametrize(
    ("narrow", "verb", "words"),
    [
        ("size=6m", "run", ["MB of files don't fit on its volume", "where Docker keeps its"]),
        ("size=200m,nr_inodes=9", "run", ["send ", "the container's disk is full", "where Docker keeps its"]),
        ("size=12m", "prepare", ["the run needs about ", "MB are free"]),
        ("size=12m", "run", ["the disk is full", "Free some space"]),
    ],
    indirect=["narrow"],
    ids=["for what is sent", "of files that can be sent", "for what is made", "for what is tried before"],
)
def test_there_is_no_space(
    narrow: str, verb: str, words: list[str], image: Client, small_base: Path, tmp_path: Path
) -> None:
    write_chats(tmp_path)
    command = [verb, "chats.jsonl", "--base-model", small_base, f"--container={narrow}"]
    code, output = image(*command, cwd=tmp_path)
    assert code == 13, output
    told(output, *words)
    assert ".partial" not in image.inside("find", "/runs", name=narrow)


@pytest.mark.parametrize("narrow", ["size=150m"], indirect=True)
def test_the_disk_fills_up_in_mid_stage(narrow: str, image: Client, small_base: Path, tmp_path: Path) -> None:
    write_chats(tmp_path)
    options = flags("native", small_base, epochs=100, **{"checkpoint-steps": 5})
    command = ["run", "chats.jsonl", *options, "--use-checkpoint", f"--container={narrow}"]
    child = image.start(*command, cwd=tmp_path)
    until_training(child)
    image.inside("dd", "if=/dev/zero", "of=/runs/filler", "bs=64k", name=narrow)
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 13, output
    told(output, "the disk is full", "Free some space")
    assert ".partial" not in image.inside("find", "/runs", name=narrow)
    image.inside("rm", "/runs/filler", name=narrow)
    code, output = image(*command, cwd=tmp_path)
    assert code == 0, output
    assert "prepare: done before" in output and "going on from step" in output, output
    finished = results(tmp_path / "outputs")
    command = ["run", "chats.jsonl", *options, "--output-dir", "undisturbed", f"--container={narrow}"]
    code, output = image(*command, cwd=tmp_path)
    assert code == 0, output
    assert results(tmp_path / "undisturbed") == finished
