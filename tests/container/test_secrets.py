"""A planted token is nowhere, and the image gives nobody a way in."""

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
    """Reads the command lines of all processes of this machine, those in containers among them, again and again."""

    def __init__(self, api: Any) -> None:
        super().__init__(daemon=True)
        self.api, self.goes_on, self.rounds = api, True, 0
        self.seen: set[bytes] = set()
        self.descriptions: set[str] = set()

    def run(self) -> None:
        while self.goes_on:
            self.rounds += 1
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    self.seen.add(path.read_bytes())
            described = self.api.inspect_container(NAME)
            self.descriptions.add(json.dumps(described))
            for each in described["ExecIDs"] or []:
                with contextlib.suppress(Exception):  # it has ended meanwhile
                    self.descriptions.add(json.dumps(self.api.exec_inspect(each)))
            time.sleep(0.05)


@pytest.mark.parametrize("source", ["environment", "file", "standard input", "config"])
def test_a_planted_token_is_nowhere(source: str, container: Client, small_base: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    write_chats(room)
    secret = tmp_path / "secret"
    secret.write_text(TOKEN + "\n")
    (room / "config.yaml").write_text(f"hf_token: {secret}\n")
    more = {
        "file": ["--hf-token", secret],
        "standard input": ["--hf-token", "-"],
        "config": ["--config", "config.yaml"],
    }
    env = {"HF_TOKEN": TOKEN} if source == "environment" else {}
    typed = TOKEN + "\n" if source == "standard input" else ""
    watcher = Watcher(container.api)
    watcher.start()
    outputs = []
    verb = "run" if source == "environment" else "prepare"
    for name, expected in (("good", 0), ("bad", 3)):
        chats = "chats.jsonl" if name == "good" else "none.jsonl"
        options = ["--base-model", small_base, "--output-dir", name, *more.get(source, [])]
        code, output = container(verb, chats, *options, "--container", cwd=room, typed=typed, **env)
        assert code == expected, output
        outputs.append(output)
    watcher.goes_on = False
    watcher.join()
    assert watcher.rounds > 10
    # It was there to be found: inside, a kolotune with that token in its environment was seen by its arguments.
    assert any(f"kolotune\0{verb}\0".encode() in each for each in watcher.seen)
    assert not [each for each in watcher.seen if TOKEN.encode() in each]
    assert any('"ProcessConfig"' in each for each in watcher.descriptions)
    assert not [each for each in watcher.descriptions if TOKEN in each]
    assert not [each for each in outputs if TOKEN in each]
    for path in room.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert container.inside("grep", "-rlF", TOKEN, "/runs", "/tmp", "/home") == ""
    with (container.folder / "log").open() as log:
        assert TOKEN not in log.read()


def test_the_token_does_reach_the_verb(container: Client, tmp_path: Path) -> None:
    """Otherwise the test above would find nothing for another reason."""
    code, output = container("doctor", "--container", "--json", cwd=tmp_path, HF_TOKEN=TOKEN)
    assert code == 0, output
    rows = json.loads(output.splitlines()[0])["rows"]
    assert [row["state"] for row in rows if row["part"] == "hub token"] == ["ok"]


def test_a_token_is_not_taken_as_a_variable_of_the_container(image: Client, tmp_path: Path) -> None:
    code, output = image("container", "start", "kolo_other", "--env", f"HF_TOKEN={TOKEN}", cwd=tmp_path)
    assert code == 2
    assert "would be readable" in output and TOKEN not in output


def test_the_image_gives_nobody_a_way_in(container: Client, tmp_path: Path) -> None:
    seen = container.api.inspect_container(NAME)
    assert container.inside("id", "-u").strip() == "1000"
    assert seen["HostConfig"]["CapDrop"] == ["ALL"] and not seen["HostConfig"]["Privileged"]
    assert seen["Config"]["User"] == "1000:1000"
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
        seen = image.api.inspect_container(name)["HostConfig"]["PortBindings"]
        assert seen == {"18431/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18431"}]}
        # Nobody listens in there, on any address: there is nothing to log in to.
        for table in ("/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp"):
            assert len(image.inside("cat", table, name=name).splitlines()) == 1
    finally:
        image.forget(name)


def test_what_only_the_build_needed_is_in_no_layer(image: Client, tmp_path: Path) -> None:
    """The image as a file: no pip settings, no proxy's certificates, no wheels."""
    names: set[str] = set()
    with (tmp_path / "image.tar").open("wb") as whole:
        for piece in image.api.get_image(image_tag()):
            whole.write(piece)
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


def test_pips_settings_go_to_the_first_stage_only(tmp_path: Path) -> None:
    """They go to the first stage's folder, which the test above finds in no layer of the image."""
    from kolotune.runners.container import build_context

    (tmp_path / "pip.conf").write_text(f"[global]\nextra-index-url = https://{TOKEN}@example.org/simple\n")
    packed = io.BytesIO()
    build_context.write(packed, pip_config=tmp_path / "pip.conf")
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar:
        holders = [entry.name for entry in tar if entry.isfile() and TOKEN.encode() in tar.extractfile(entry).read()]
    assert holders == ["build/pip.conf"]
