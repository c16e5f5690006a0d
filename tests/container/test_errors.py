"""Everything that can be wrong with Docker and the container: each has its own exit code, a cause and a hint."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from support.docker_engine import Client, require_error, until_training

from kolotune.runners.container.names import image_tag

pytestmark = pytest.mark.container


def _chats(folder: Path) -> Path:
    chats = folder / "chats.jsonl"
    line = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}'
    chats.write_text(f"{line}\n{line}\n")
    return chats


def test_docker_is_not_running(image: Client, tmp_path: Path) -> None:
    code, output = image("models", "--container", cwd=tmp_path, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert code == 15
    require_error(output, "not running, or not installed", "DOCKER_HOST")


def test_the_image_is_missing(image: Client, other: str, tmp_path: Path) -> None:
    code, output = image("container", "start", other, "--image", "kolotune:never", cwd=tmp_path)
    assert code == 16
    require_error(output, "no image kolotune:never", "kolotune container build")


def test_the_base_image_is_missing(image: Client, tmp_path: Path) -> None:
    code, output = image("container", "build", "--base", "kolotune-tests/never:1", cwd=tmp_path)
    assert code == 17
    require_error(output, "kolotune-tests/never:1", "Check --base")


def test_the_container_is_missing(container: Client, tmp_path: Path) -> None:
    code, output = container("models", "--container=something-else", cwd=tmp_path)
    assert code == 18
    require_error(output, "something-else", "kolotune container start something-else")


def test_only_a_similar_container_exists(image: Client, other: str, tmp_path: Path) -> None:
    image.bring_up(other)
    # The first 12 digits of a container's id are not its name.
    number = image.api.inspect_container(other)["Id"][:12]
    assert image("models", f"--container={number}", cwd=tmp_path)[0] == 18
    code, output = image("models", "--container", "kolo_container22", cwd=tmp_path)
    assert code == 19
    require_error(output, "kolo_container22", f"--container={other}")


def test_the_container_is_paused_or_stopped(image: Client, other: str, tmp_path: Path) -> None:
    image.bring_up(other)
    image.api.pause(other)
    code, output = image("models", f"--container={other}", cwd=tmp_path)
    assert code == 21
    require_error(output, "is paused", f"docker unpause {other}")
    image.bring_up(other)
    assert image("models", f"--container={other}", cwd=tmp_path)[0] == 0
    code, output = image("container", "stop", other, cwd=tmp_path)
    assert code == 0
    code, output = image("models", f"--container={other}", cwd=tmp_path)
    assert code == 20
    require_error(output, "exited", "kolotune container start")


def test_the_container_has_another_version(image: Client, other: str, tmp_path: Path) -> None:
    tag = "kolotune-tests/other-version:1"
    text = f"FROM {image_tag()}\nLABEL kolotune.version=0.0.9\n"
    list(image.api.build(fileobj=io.BytesIO(text.encode()), tag=tag, rm=True, decode=True))
    image.bring_up(other, "--image", tag)
    code, output = image("models", f"--container={other}", cwd=tmp_path)
    assert code == 23
    require_error(output, "0.0.9", "--anew")


def test_a_second_client_is_refused(container: Client, small_base: Path, tmp_path: Path) -> None:
    chats = _chats(tmp_path)
    command = ["run", chats, "--base-model", small_base, "--epochs", "500", "--eval-split", "0", "--container"]
    child = container.start(*command, cwd=tmp_path)
    until_training(child)
    code, output = container(*command, cwd=tmp_path)
    assert code == 12
    require_error(output, "in use by process", str(tmp_path / "outputs"))
    child.kill()
    child.wait()
    started = time.monotonic()
    assert container.idle_within(15), time.monotonic() - started


def test_the_shell_reads_commands_from_a_pipe(image: Client, other: str, tmp_path: Path) -> None:
    image.bring_up(other)
    assert image("container", "shell", other, cwd=tmp_path, stdin="id -u; exit 7\n") == (7, "1000\n")
