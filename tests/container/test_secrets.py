"""A planted token appears nowhere, and nobody can log in to the container."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from contracts import write_chats
from support.docker_engine import NAME, Client

from kolotune.runners.container.names import image_tag

pytestmark = pytest.mark.container
TOKEN = "hf_PlantedTokenThatMustNotBeSeenAnywhere"


class Watcher(threading.Thread):
    """Reads the command lines of all processes of this machine, including those in containers, until it is stopped."""

    def __init__(self, api: Any) -> None:
        super().__init__(daemon=True)
        self.api, self.is_active, self.rounds = api, True, 0
        self.command_lines: set[bytes] = set()
        self.descriptions: set[str] = set()

    def run(self) -> None:
        while self.is_active:
            self.rounds += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    self.command_lines.add(path.read_bytes())
            described = self.api.inspect_container(NAME)
            self.descriptions.add(json.dumps(described))
            for number in described["ExecIDs"] or []:
                with contextlib.suppress(Exception):  # the process has ended meanwhile
                    self.descriptions.add(json.dumps(self.api.exec_inspect(number)))
            time.sleep(0.05)


@pytest.mark.parametrize("source", ["environment", "file", "standard input", "config"])
def test_a_planted_token_appears_nowhere(source: str, container: Client, small_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_chats(folder)
    secret = tmp_path / "secret"
    secret.write_text(TOKEN + "\n")
    (folder / "config.yaml").write_text(f"hf_token: {secret}\n")
    more = {
        "file": ["--hf-token", secret],
        "standard input": ["--hf-token", "-"],
        "config": ["--config", "config.yaml"],
    }
    env = {"HF_TOKEN": TOKEN} if source == "environment" else {}
    stdin = TOKEN + "\n" if source == "standard input" else ""
    watcher = Watcher(container.api)
    watcher.start()
    outputs = []
    verb = "run" if source == "environment" else "prepare"
    for name, expected in (("good", 0), ("bad", 3)):
        chats = "chats.jsonl" if name == "good" else "none.jsonl"
        options = ["--base-model", small_base, "--output-dir", name, *more.get(source, [])]
        code, output = container(verb, chats, *options, "--container", cwd=folder, stdin=stdin, **env)
        assert code == expected, output
        outputs.append(output)
    watcher.is_active = False
    watcher.join()
    assert watcher.rounds > 10
    # The watcher has seen the kolotune inside that has the token in its environment.
    assert any(f"kolotune\0{verb}\0".encode() in line for line in watcher.command_lines)
    assert not [line for line in watcher.command_lines if TOKEN.encode() in line]
    assert any('"ProcessConfig"' in text for text in watcher.descriptions)
    assert not [text for text in watcher.descriptions if TOKEN in text]
    assert not [output for output in outputs if TOKEN in output]
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert container.inside("grep", "-rlF", TOKEN, "/runs", "/tmp", "/home") == ""
    with (container.folder / "log").open() as log:
        assert TOKEN not in log.read()


def test_the_token_reaches_the_verb(container: Client, tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    code, output = container("doctor", "--container", "--json", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert code == 0, output
    rows = json.loads(output.splitlines()[0])["rows"]
    assert [row["state"] for row in rows if row["part"] == "hub token"] == ["ok"]


def test_a_token_is_refused_as_a_variable_of_the_container(image: Client, tmp_path: Path) -> None:
    code, output = image("container", "start", "kolo_other", "--env", f"HF_TOKEN={TOKEN}", cwd=tmp_path)
    assert code == 2
    assert "would be readable" in output and TOKEN not in output


def test_nobody_can_log_in(container: Client, tmp_path: Path) -> None:
    container_state = container.api.inspect_container(NAME)
    assert container.inside("id", "-u").strip() == "1000"
    assert container_state["HostConfig"]["CapDrop"] == ["ALL"] and not container_state["HostConfig"]["Privileged"]
    assert container_state["Config"]["User"] == "1000:1000"
    users = {row[1] for row in container.api.top(NAME, "-eo pid,uid,args")["Processes"]}
    assert users == {"1000"}
    assert container.inside("sh", "-c", "command -v sshd dropbear sudo gcc cmake") == ""
    accounts = container.inside("cat", "/etc/shadow", user="root").splitlines()
    assert accounts and all(line.split(":")[1] in ("*", "!", "!!", "!*") for line in accounts)
    assert "Permission denied" in container.inside("sh", "-c", "echo x > /opt/kolotune/app/kolotune/version.py")


def test_ports_are_on_the_loopback_only(image: Client, tmp_path: Path) -> None:
    name = "kolo_ports"
    try:
        assert image("container", "start", name, "--port", "18431", "--network", "none", cwd=tmp_path)[0] == 0
        bindings = image.api.inspect_container(name)["HostConfig"]["PortBindings"]
        assert bindings == {"18431/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18431"}]}
        # No process inside listens on any address.
        for table in ("/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp"):
            assert len(image.inside("cat", table, name=name).splitlines()) == 1
    finally:
        image.forget(name)


def test_no_layer_contains_build_settings(image: Client, tmp_path: Path) -> None:
    """The layers contain no pip settings, no certificates and no wheels."""
    names: set[str] = set()
    with (tmp_path / "image.tar").open("wb") as whole:
        for chunk in image.api.get_image(image_tag()):
            whole.write(chunk)
    with tarfile.open(tmp_path / "image.tar") as layers:
        for layer in layers:
            if layer.name.endswith("layer.tar"):
                content = layers.extractfile(layer)
                assert content is not None
                with tarfile.open(fileobj=content) as files:
                    names |= {name.removeprefix("./") for name in files.getnames()}
    assert "opt/kolotune/app/kolotune/version.py" in names
    ours = [name for name in names if not name.startswith("usr/")]  # the base brings pip's own wheels
    assert not [name for name in ours if name.startswith("build") or name.endswith((".whl", "pip.conf", "ca.pem"))]
    history = json.dumps(image.api.history(image_tag()))
    assert "pip install" not in history


def test_pip_settings_are_in_the_build_folder_only(tmp_path: Path) -> None:
    """The test above shows that no layer contains that folder."""
    from kolotune.runners.container import build_context

    (tmp_path / "pip.conf").write_text(f"[global]\nextra-index-url = https://{TOKEN}@example.org/simple\n")
    buffer = io.BytesIO()
    build_context.write(buffer, pip_config=tmp_path / "pip.conf")
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        files = [entry.name for entry in tar if entry.isfile() and TOKEN.encode() in tar.extractfile(entry).read()]
    assert files == ["build/pip.conf"]
