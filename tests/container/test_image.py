"""The base of the image."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.docker_engine import Client, require_error
from support.waiting import free_port, wait_until

pytestmark = pytest.mark.container


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """The address of an image registry on the loopback."""
    if shutil.which("docker-registry") is None:
        needed = os.environ.get("KOLOTUNE_NEEDS_DOCKER") == "1"
        (pytest.fail if needed else pytest.skip)("needs docker-registry: apt-get install docker-registry")
    port = free_port()
    config = tmp_path / "registry.yml"
    storage = f"storage:\n  filesystem:\n    rootdirectory: {tmp_path}/registry\n"
    config.write_text(f"version: 0.1\n{storage}http:\n  addr: 127.0.0.1:{port}\n")
    child = subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, "the registry did not start", 30)
    yield f"127.0.0.1:{port}"
    child.kill()
    child.wait()
    shutil.rmtree(tmp_path / "registry", ignore_errors=True)


def _push_base(api: Any, repository: str, message: str) -> str:
    """Push a base with nothing but a shell, whose builds fail at once with a message; return it with its digest."""
    linked = re.findall(r"(/lib\S+) ", subprocess.run(["ldd", "/bin/sh"], capture_output=True, text=True).stdout)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", dereference=True) as tar:
        for path in ("/bin/sh", *linked):
            tar.add(path)
        script = tarfile.TarInfo("usr/bin/apt-get")
        content = f"#!/bin/sh\necho {message}\nexit 1\n".encode()
        script.size, script.mode = len(content), 0o755
        tar.addfile(script, io.BytesIO(content))
    api.import_image_from_data(packed.getvalue(), repository=repository, tag="1")
    answers = list(api.push(repository, tag="1", stream=True, decode=True))
    (digest,) = [answer["aux"]["Digest"] for answer in answers if "aux" in answer]
    return f"{repository}@{digest}"


def test_a_base_can_be_pinned_by_its_digest(docker_engine: Client, registry: str, tmp_path: Path) -> None:
    repository = f"{registry}/kolotune-tests/base"
    build = ["container", "build", "--network", "host", "--base"]
    pinned = _push_base(docker_engine.api, repository, "the first base")
    assert _push_base(docker_engine.api, repository, "the second base") != pinned
    docker_engine.api.remove_image(pinned)  # it must be pulled
    never = pinned[:-1] + ("0" if pinned[-1] != "0" else "1")
    try:
        for base, message in ((pinned, ": the first base"), (f"{repository}:1", ": the second base"), (never, never)):
            code, output = docker_engine(*build, base, cwd=tmp_path)
            assert code == 17, output
            require_error(output, message)
    finally:
        for base in (pinned, f"{repository}:1"):
            docker_engine.api.remove_image(base, force=True)
