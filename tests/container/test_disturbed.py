"""The container, or Docker, is paused, restarted, stopped or removed while a verb runs: nothing is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from contracts import flags, write_chats
from support.docker_engine import NAME, Client, read_until, require_error, until_training
from support.runs import results

from kolotune.engines.native.checkpointer import TENSORS
from kolotune.foundation.errors import ContainerLostError, ContainerPausedError
from kolotune.foundation.reporter import PlainReporter
from kolotune.runners.container import archive, names, process
from kolotune.runners.container.archive import ArchiveFile
from kolotune.runners.container.docker import Docker
from kolotune.runners.container.process import ContainerProcess
from kolotune.runners.container.volume import Volume

pytestmark = [pytest.mark.container, pytest.mark.timeout(900)]
SLOW = pytest.mark.slow
NOTICED_SECONDS = 15.0
GONE_SECONDS = 10.0


def _command(base: Path, *more: str) -> list[str]:
    """Return a run that trains for some seconds and writes checkpoints all the time."""
    return ["run", "chats.jsonl", *flags("native", base, epochs=60, **{"checkpoint-steps": 10}), *more]


@pytest.fixture(scope="module")
def undisturbed(image: Client, small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The results of that run without a disturbance."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_chats(folder)
    image.bring_up("kolo_undisturbed")
    code, output = image(*_command(small_base, "--container=kolo_undisturbed"), cwd=folder)
    image.forget("kolo_undisturbed")
    assert code == 0, output
    return results(folder / "outputs")


def _until_checkpoint(client: Client, name: str) -> None:
    """Wait until the training inside has a checkpoint."""
    while not client.inside("find", "/runs", "-path", "*/checkpoints/*", "-name", TENSORS, name=name):
        time.sleep(0.1)


@dataclass(frozen=True)
class Disturbance:
    """What happens to the container or to Docker, and possible error messages of the client."""

    do: Callable[[Client, str], Any]
    messages: tuple[str, ...]
    downs_docker: bool = False


_RESTARTED, _DOWN = "was stopped or restarted during run", "Docker went away during run"
DISTURBANCES = {
    "restarted": Disturbance(lambda client, name: client.api.restart(name, timeout=5), (_RESTARTED,)),
    "restarted at once": Disturbance(lambda client, name: client.api.restart(name, timeout=0), (_RESTARTED,)),
    "stopped": Disturbance(lambda client, name: client.api.stop(name, timeout=5), (_RESTARTED,)),
    "killed": Disturbance(lambda client, name: client.api.kill(name), (_RESTARTED,)),
    # Docker removes it in several steps, and the client may look in between.
    "removed": Disturbance(
        lambda client, name: client.api.remove_container(name, force=True), ("was removed during run", _RESTARTED)
    ),
    # Docker stops its containers first, and still answers meanwhile.
    "docker is stopped": Disturbance(lambda client, _: client.engine.end(), (_DOWN, _RESTARTED), downs_docker=True),
    "docker is killed": Disturbance(lambda client, _: client.engine.end(signal.SIGKILL), (_DOWN,), downs_docker=True),
}


@pytest.fixture
def restored(image: Client) -> Iterator[None]:
    """After the test, start the engine again, and the first container if there is one."""
    yield
    if not image.engine.is_up():
        image.engine.start()
    if image.api.containers(all=True, filters={"name": f"^/{NAME}$"}):
        image.bring_up(NAME)


@pytest.mark.parametrize(
    "how", [name if name == "stopped" else pytest.param(name, marks=SLOW) for name in DISTURBANCES]
)
def test_the_same_command_finishes_the_run(
    how: str, image: Client, other: str, restored: None, small_base: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    disturbance = DISTURBANCES[how]
    image.bring_up(other)
    write_chats(tmp_path)
    command = _command(small_base, "--use-checkpoint", f"--container={other}")
    child = image.start(*command, cwd=tmp_path)
    until_training(child)
    _until_checkpoint(image, other)
    disturbance.do(image, other)
    rest = child.communicate(timeout=60)[0]
    assert child.returncode == 22, rest
    require_error(rest, "run the same command again", f"kolotune container start {other}")
    assert any(message in rest for message in disturbance.messages), rest
    if disturbance.downs_docker:
        code, output = image(*command, cwd=tmp_path)
        assert code == 15, output
        require_error(output, "not running, or not installed")
        image.engine.start()
    image.bring_up(other)
    code, output = image(*command, cwd=tmp_path)
    assert code == 0, output
    assert "prepare: done before" in output, output
    # When Docker is killed the container keeps running, so the training may have finished.
    assert "resuming from step" in output or (how == "docker is killed" and "train: done before" in output), output
    assert results(tmp_path / "outputs") == undisturbed
    assert image.idle_within(1, other)


def test_a_pause_is_reported_and_waited_for(
    image: Client, other: str, small_base: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    image.bring_up(other)
    write_chats(tmp_path)
    child = image.start(*_command(small_base, f"--container={other}"), cwd=tmp_path)
    until_training(child)
    image.api.pause(other)
    paused = time.monotonic()
    line = read_until(child, "is paused, and run is waiting")
    assert time.monotonic() - paused < NOTICED_SECONDS
    assert f"docker unpause {other}" in line
    time.sleep(2 * process._LOOK_SECONDS)
    assert child.poll() is None
    image.api.unpause(other)
    rest = child.communicate(timeout=570)[0]
    assert child.returncode == 0, rest
    assert f"container {other}: run continues" in rest and "is paused" not in rest, rest
    assert results(tmp_path / "outputs") == undisturbed


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@SLOW
def test_a_client_that_ends_during_a_pause_leaves_no_process_behind(
    how: signal.Signals, image: Client, other: str, small_base: Path, tmp_path: Path
) -> None:
    image.bring_up(other)
    write_chats(tmp_path)
    child = image.start(*_command(small_base, f"--container={other}"), cwd=tmp_path)
    until_training(child)
    image.api.pause(other)
    read_until(child, "is paused")
    child.send_signal(how)
    if how == signal.SIGINT:  # the client waits for the process inside, until the second interruption
        time.sleep(2)
        assert child.poll() is None
        child.send_signal(how)
    rest = child.communicate(timeout=30)[0]
    assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in rest
    assert image.processes(other)
    image.api.unpause(other)
    assert image.idle_within(GONE_SECONDS, other)


@pytest.fixture
def volume(image: Client, other: str, monkeypatch: pytest.MonkeyPatch) -> Volume:
    """The volume of the second container."""
    image.bring_up(other)
    monkeypatch.setenv("DOCKER_HOST", image.engine.host)
    docker = Docker()
    return Volume(docker, docker.require_running(other))


_SLEEP = [names.PYTHON, "-c", "import time; time.sleep(30)"]


def _ignore(chunk: bytes, is_stderr: bool) -> None:
    del chunk, is_stderr


def _until_started(client: Client, name: str) -> None:
    while not any("time.sleep" in line for line in client.processes(name)):
        time.sleep(0.05)


@SLOW
def test_the_wait_for_a_pause_ends(
    volume: Volume, image: Client, other: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(process, "_PAUSED_SECONDS", 2.0)
    running = ContainerProcess(volume.docker, volume.container, _SLEEP, doing="train", reporter=PlainReporter())
    _until_started(image, other)
    image.api.pause(other)
    with pytest.raises(ContainerPausedError, match="is paused, and train is waiting") as caught:
        running.wait(_ignore)
    assert f"docker unpause {other}" in caught.value.hint and "same command again" in caught.value.hint
    assert capsys.readouterr().out.count(f"warning: container {other}: is paused") == 1


# A pause while Docker starts a process can make Docker itself hang (runc with cgroups v1).
@pytest.mark.parametrize("is_started", [True, pytest.param(False, marks=SLOW)])
def test_a_short_command_does_not_wait_for_a_pause(is_started: bool, volume: Volume, image: Client, other: str) -> None:
    running = ContainerProcess(volume.docker, volume.container, _SLEEP, doing="a question")
    if is_started:
        _until_started(image, other)
    image.api.pause(other)
    with pytest.raises(ContainerPausedError, match="is paused"):
        running.wait(_ignore)
    with pytest.raises(ContainerPausedError, match="is paused"):
        volume.ask(list[bool], "have", "/runs")


@SLOW
def test_a_verb_waits_while_docker_copies_files_of_another_client(
    volume: Volume, other: str, image: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    """While Docker copies files in, it answers no request about that container. The verb goes through."""
    seconds = 3 * process._LOOK_SECONDS

    def slowly() -> Iterator[bytes]:
        whole = b"".join(archive.pack([ArchiveFile("slow", b"x" * 10_000)]))
        yield whole[:1000]
        time.sleep(seconds)
        yield whole[1000:]

    code = [names.PYTHON, "-c", f"import time; time.sleep({seconds + 2}); print('done')"]
    running = ContainerProcess(volume.docker, volume.container, code, doing="train", reporter=PlainReporter())
    sending = threading.Thread(target=image.api.put_archive, args=(other, "/runs", slowly()))
    sending.start()
    volume.docker.api.timeout = 1
    chunks: list[bytes] = []
    assert running.wait(lambda chunk, is_stderr: chunks.append(chunk)) == 0
    sending.join()
    assert b"".join(chunks) == b"done\n"
    output = capsys.readouterr().out
    assert output.count("warning: ") == 1 and "Docker has not answered for 1 s" in output
    assert f"container {other}: train continues" in output


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (lambda api, name: api.stop(name, timeout=5), "was stopped or restarted"),
        (lambda api, name: api.remove_container(name, force=True), "was removed"),
    ],
    ids=["stopped", "removed"],
)
@SLOW
def test_the_container_goes_away_between_two_commands(
    disturb: Callable[[Any, str], None], message: str, volume: Volume, image: Client, other: str
) -> None:
    assert volume.ask(list[bool], "have", "/runs") == [True]
    disturb(image.api, other)
    with pytest.raises(ContainerLostError, match=f"{message} during the exchange of files"):
        volume.ask(list[bool], "have", "/runs")


def _large(folder: Path) -> Path:
    path = folder / "large.bin"
    with path.open("wb") as file:
        file.truncate(200_000_000)
    return path


def _half_sent(client: Client, name: str) -> list[Path]:
    """Return partial files on the volume, read from the host: Docker does not answer while it copies files in."""
    return list(Path(client.api.inspect_volume(f"{name}_runs")["Mountpoint"]).glob(".*.partial"))


def _until_sending(client: Client, name: str) -> None:
    while not _half_sent(client, name):
        time.sleep(0.01)


@pytest.mark.parametrize("whose", ["container", "docker"])
@SLOW
def test_the_container_or_docker_goes_away_while_files_are_sent(
    whose: str, volume: Volume, image: Client, other: str, restored: None, tmp_path: Path
) -> None:
    """Partial files are never used, and the next start removes them."""
    path, caught = _large(tmp_path), []
    first = image.api.inspect_container(other)["State"]["Pid"]

    def send() -> None:
        try:
            volume.send([ArchiveFile("large.bin", path)], names.INPUTS / "large")
        except ContainerLostError as error:
            caught.append(error.cause)

    sending = threading.Thread(target=send)
    sending.start()
    _until_sending(image, other)
    if whose == "docker":
        image.engine.end(signal.SIGKILL)
    else:
        os.kill(first, signal.SIGKILL)
    sending.join(120)
    assert len(caught) == 1 and "during the exchange of files" in caught[0], caught
    if whose == "docker":
        image.engine.start()
    assert _half_sent(image, other)
    image.bring_up(other)
    assert not _half_sent(image, other)
    assert "large" not in image.inside("ls", "-A", str(names.INPUTS), name=other)


@SLOW
def test_docker_goes_away_while_files_are_fetched(volume: Volume, image: Client, other: str, restored: None) -> None:
    image.inside("dd", "if=/dev/zero", "of=/runs/large", "bs=1M", "count=100", name=other)
    chunks, _ = image.api.get_archive(other, "/runs/large")
    with (
        pytest.raises(ContainerLostError, match="Docker went away during train"),
        volume.docker.during("train", volume.container),
    ):
        next(chunks)
        image.engine.end(signal.SIGKILL)
        list(chunks)


@SLOW
def test_the_client_is_killed_while_it_sends_files(image: Client, other: str, tmp_path: Path) -> None:
    image.bring_up(other)
    child = image.start("check", _large(tmp_path), f"--container={other}", cwd=tmp_path)
    _until_sending(image, other)
    child.kill()
    child.communicate()
    assert image.idle_within(GONE_SECONDS, other)
    assert _half_sent(image, other)
    assert image("container", "stop", other, cwd=tmp_path)[0] == 0
    image.bring_up(other)
    assert not _half_sent(image, other)
    assert "large" not in image.inside("find", str(names.INPUTS), name=other)


def test_a_container_of_a_similar_name_is_left_alone(
    container: Client, other: str, small_base: Path, tmp_path: Path
) -> None:
    container.bring_up(other)
    before = _described(container, other)
    write_chats(tmp_path)
    command = ["run", "chats.jsonl", *flags("native", small_base, epochs=1)]
    assert container(*command, f"--container={NAME}", cwd=tmp_path)[0] == 0
    child = container.start(*command, "--epochs", "500", f"--container={NAME}", cwd=tmp_path)
    until_training(child)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    for arguments in (["status"], ["stop", NAME], ["start", NAME], ["start", NAME, "--anew", "--network", "host"]):
        code, output = container("container", *arguments, cwd=tmp_path)
        assert code == 0, output
    for name in (other[:-2], f"{other}2"):
        code, output = container("container", "stop", name, cwd=tmp_path)
        assert code == 19, output
        assert container(*command, f"--container={name}", cwd=tmp_path)[0] == 19
    assert _described(container, other) == before


def _described(client: Client, name: str) -> list[object]:
    container = client.api.inspect_container(name)
    state = {key: container["State"][key] for key in ("Status", "StartedAt", "FinishedAt", "Pid")}
    files = client.inside("find", "/runs", "-printf", "%p %i %T@\\n", name=name)
    return [container["Id"], state, container["RestartCount"], files, client.processes(name)]
