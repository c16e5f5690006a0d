"""Everything that can be wrong with Docker and the container: each its own code, one cause, one thing to do."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.docker_engine import Client, until_training

from kolotune.runners.container.places import image_tag

pytestmark = pytest.mark.container
OTHER = "kolo_container2"


@pytest.fixture
def other(image: Client, tmp_path: Path) -> Iterator[str]:
    """The name of a second container, which is removed at the end."""
    yield OTHER
    image.forget(OTHER)


def _start(client: Client, name: str, *more: str) -> None:
    code, output = client("container", "start", name, "--network", "host", *more, cwd=client.folder)
    assert code == 0, output


def _chats(folder: Path) -> Path:
    chats = folder / "chats.jsonl"
    line = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'
    chats.write_text(f"{line}\n{line}\n")
    return chats


def _told(output: str, *words: str) -> None:
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    for word in words:
        assert word in output


def test_docker_is_not_there(image: Client, tmp_path: Path) -> None:
    code, output = image("models", "--container", cwd=tmp_path, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert code == 15
    _told(output, "not running, or not installed", "DOCKER_HOST")


def test_there_is_no_image(image: Client, other: str, tmp_path: Path) -> None:
    code, output = image("container", "start", other, "--image", "kolotune:never", cwd=tmp_path)
    assert code == 16
    _told(output, "no image kolotune:never", "kolotune container build")


def test_a_build_on_a_base_that_is_not_there(image: Client, tmp_path: Path) -> None:
    code, output = image("container", "build", "--base", "kolotune-tests/never:1", cwd=tmp_path)
    assert code == 17
    _told(output, "the base image kolotune-tests/never:1 can't be had", "Check --base")


def test_there_is_no_such_container(container: Client, tmp_path: Path) -> None:
    code, output = container("models", "--container=something-else", cwd=tmp_path)
    assert code == 18
    _told(output, "something-else", "kolotune container start something-else")


def test_there_is_only_one_of_a_similar_name(image: Client, other: str, tmp_path: Path) -> None:
    _start(image, other)
    # 12 digits of a container's number are no name of it either.
    number = image.api.inspect_container(other)["Id"][:12]
    assert image("models", f"--container={number}", cwd=tmp_path)[0] == 18
    code, output = image("models", "--container", "kolo_container22", cwd=tmp_path)
    assert code == 19
    _told(output, "kolo_container22", f"only one named {OTHER}", f"--container={OTHER}")


def test_it_is_paused_or_stopped(image: Client, other: str, tmp_path: Path) -> None:
    _start(image, other)
    image.api.pause(other)
    code, output = image("models", f"--container={other}", cwd=tmp_path)
    assert code == 21
    _told(output, "is paused")
    _start(image, other)
    assert image("models", f"--container={other}", cwd=tmp_path)[0] == 0
    code, output = image("container", "stop", other, cwd=tmp_path)
    assert code == 0
    code, output = image("models", f"--container={other}", cwd=tmp_path)
    assert code == 20
    _told(output, "is not running (exited)", "kolotune container start")


def test_its_kolotune_is_another(image: Client, other: str, tmp_path: Path) -> None:
    tag = "kolotune-tests/other-version:1"
    text = f"FROM {image_tag()}\nLABEL kolotune.version=0.0.9\n"
    list(image.api.build(fileobj=io.BytesIO(text.encode()), tag=tag, rm=True, decode=True))
    _start(image, other, "--image", tag)
    code, output = image("models", f"--container={other}", cwd=tmp_path)
    assert code == 23
    _told(output, "has kolotune 0.0.9", "--anew")


def test_it_is_stopped_in_mid_stage_and_the_same_command_finishes(
    image: Client, other: str, small_base: Path, tmp_path: Path
) -> None:
    _start(image, other)
    chats = _chats(tmp_path)
    command = ["run", chats, "--base-model", small_base, "--epochs", "300", "--eval-split", "0", "--lora-rank", "2",
               "--quantization", "none", "--dtype", "fp32", f"--container={other}"]  # fmt: skip
    child = image.start(*command, cwd=tmp_path)
    until_training(child)
    image.api.stop(other, timeout=5)
    rest = child.communicate(timeout=60)[0]
    assert child.returncode == 22
    _told(rest, "was stopped or restarted during run", "run the same command again")
    _start(image, other)
    code, output = image(*command, "--epochs", "2", cwd=tmp_path)
    assert code == 0, output
    assert "prepare: done before" in output, output
    assert (tmp_path / "outputs" / "Merged.gguf").is_file()


@pytest.fixture
def narrow(image: Client, other: str, request: pytest.FixtureRequest) -> str:
    """A container whose volume holds so many MB."""
    options = {"type": "tmpfs", "device": "tmpfs", "o": f"size={request.param}m,uid=1000,gid=1000"}
    image.api.create_volume(f"{other}_runs", driver="local", driver_opts=options)
    _start(image, other)
    return other


@pytest.mark.parametrize(
    ("narrow", "words"),
    [(6, "the container's disk is full"), (12, "MB are free")],
    indirect=["narrow"],
    ids=["for what is sent", "for what is made"],
)
def test_there_is_no_space(narrow: str, words: str, image: Client, small_base: Path, tmp_path: Path) -> None:
    chats = _chats(tmp_path)
    code, output = image("prepare", chats, "--base-model", small_base, f"--container={narrow}", cwd=tmp_path)
    assert code == 13, output
    assert words in output and "Traceback" not in output
    assert ".partial" not in image.inside("find", "/runs", name=narrow)


def test_a_second_client_is_told_who_is_at_work(container: Client, small_base: Path, tmp_path: Path) -> None:
    chats = _chats(tmp_path)
    command = ["run", chats, "--base-model", small_base, "--epochs", "500", "--eval-split", "0", "--container"]
    child = container.start(*command, cwd=tmp_path)
    until_training(child)
    code, output = container(*command, cwd=tmp_path)
    assert code == 12
    _told(output, "in use by process", str(tmp_path / "outputs"))
    child.kill()
    child.wait()
    started = time.monotonic()
    assert container.idle_within(15), time.monotonic() - started
