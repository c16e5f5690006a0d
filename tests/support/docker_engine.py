"""A real Docker engine for tests, with an image that `kolotune container build` made and a container of it.

Needs root. The engine's data folder is kept between runs (KOLOTUNE_TEST_CACHE, or the user's cache), so that only
what has changed is built again. No image comes from a registry: the base is made with debootstrap.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PROGRAM = [sys.executable, "-m", "kolotune"]
BASE = "kolotune-tests/python:bookworm"
NAME = "kolo_container"
_START_SECONDS = 60.0
_LOCK = Path(__file__).parents[2] / "kolotune" / "image" / "requirements.lock"


def until_training(child: subprocess.Popen[str]) -> None:
    """Reads what a run says until its first step is done."""
    assert child.stdout is not None
    seen = []
    for line in child.stdout:
        seen.append(line)
        if re.match(r"\s*training \d+/", line):
            return
    pytest.fail(f"it ended by itself: {''.join(seen)}")


@dataclass(frozen=True)
class Client:
    """kolotune as a user of that engine calls it."""

    host: str
    folder: Path
    api: Any = field(repr=False)

    def env(self, **more: str) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": self.host, **more}

    def start(self, *arguments: Any, cwd: Path, **env: str) -> subprocess.Popen[str]:
        """Starts kolotune and does not wait for it."""
        return subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            cwd=cwd,
            env=self.env(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *arguments: Any, cwd: Path, typed: str = "", **env: str) -> tuple[int, str]:
        """Runs kolotune to its end; returns the exit code and all that it printed."""
        child = self.start(*arguments, cwd=cwd, **env)
        output, _ = child.communicate(typed, timeout=570)
        return child.returncode, output

    def processes(self, name: str = NAME) -> list[str]:
        """The command lines inside a container, other than those that keep it up."""
        lines = [row[-1] for row in self.api.top(name, "-eo pid,args")["Processes"]]
        return [line for line in lines if "docker-init" not in line and line != "sleep infinity"]

    def idle_within(self, seconds: float, name: str = NAME) -> bool:
        """Whether nothing of ours runs inside after at most so many seconds."""
        deadline = time.monotonic() + seconds
        while left := self.processes(name):
            if time.monotonic() > deadline:
                print("left behind:", left)
                return False
            time.sleep(0.1)
        return True

    def inside(self, *argv: str, name: str = NAME, user: str = "") -> str:
        """What a program inside a container prints."""
        made = self.api.exec_create(name, list(argv), user=user)
        return bytes(self.api.exec_start(made["Id"])).decode()

    def forget(self, name: str) -> None:
        """Removes a container and its volume, if they are there."""
        import docker.errors

        for remove in (
            lambda: self.api.remove_container(name, force=True),
            lambda: self.api.remove_volume(f"{name}_runs", force=True),
        ):
            with contextlib.suppress(docker.errors.NotFound):
                remove()


def _cache() -> Path:
    root = os.environ.get("KOLOTUNE_TEST_CACHE") or Path("~/.cache/kolotune-tests").expanduser()
    return Path(root, "docker")


def _why_not() -> str:
    if os.name != "posix" or os.geteuid() != 0:
        return "a Docker engine of our own needs root on Linux"
    missing = [name for name in ("dockerd", "debootstrap") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)}: apt-get install docker.io debootstrap" if missing else ""


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Client]:
    """An engine that runs while the tests do."""
    if why := _why_not():
        (pytest.fail if os.environ.get("KOLOTUNE_NEEDS_DOCKER") == "1" else pytest.skip)(why)
    import docker

    data = _cache() / "data"
    data.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kolo-", dir="/tmp"))  # a socket's path may not be long
    argv = [
        "dockerd", "--data-root", str(data), "--exec-root", str(folder / "exec"), "-H", f"unix://{folder}/d.sock",
        "--pidfile", str(folder / "pid"), "--iptables=false", "--bridge=none", "--storage-driver=overlay2",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + _START_SECONDS
    while not (folder / "d.sock").exists():
        if daemon.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"dockerd did not start: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.1)
    host = f"unix://{folder}/d.sock"
    api = docker.APIClient(base_url=host, version="auto", timeout=120)
    yield Client(host, folder, api)
    api.close()
    daemon.terminate()
    daemon.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


def _make_base(api: Any) -> None:
    with tempfile.TemporaryDirectory(dir=_cache()) as folder:
        packages = "python3,python3-venv,ca-certificates,libgomp1"
        subprocess.run(["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", "root"],
                       cwd=folder, check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        subprocess.run(["tar", "-C", "root", "-cf", "root.tar", "."], cwd=folder, check=True)
        repository, _, tag = BASE.partition(":")
        api.import_image_from_file(str(Path(folder, "root.tar")), repository=repository, tag=tag)


def wheels() -> Path:
    """The large wheels as pip finds them here, so that the build neither compiles nor takes a GPU's PyTorch."""
    pins = [line for line in _LOCK.read_text().splitlines() if line.startswith(("torch==", "llama-cpp-python=="))]
    folder = _cache() / "wheels" / "-".join(pins)
    if not folder.is_dir():
        partial = folder.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(partial), *pins]
        subprocess.run(argv, check=True)
        partial.rename(folder)
    return folder


def build_arguments() -> list[str]:
    """What `kolotune container build` needs on this machine."""
    return ["--base", BASE, "--wheels", str(wheels()), "--network", "host", *certificates()]


def certificates() -> list[str]:
    """The option that makes pip in there trust what this machine trusts."""
    bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    return ["--ca-bundle", bundle] if bundle else []


@pytest.fixture(scope="session")
def image(docker_engine: Client) -> Client:
    """The engine, with the image of this kolotune built."""
    if not docker_engine.api.images(BASE, quiet=True):
        _make_base(docker_engine.api)
    code, output = docker_engine("container", "build", *build_arguments(), cwd=docker_engine.folder)
    assert code == 0, output
    return docker_engine


@pytest.fixture(scope="session")
def container(image: Client) -> Iterator[Client]:
    """The engine, with a fresh container that runs."""
    image.forget(NAME)
    code, output = image("container", "start", "--network", "host", cwd=image.folder)
    assert code == 0, output
    yield image
    image.forget(NAME)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], reporter: Any) -> Path:
    """A random Llama of 2 layers with SmolLM2's tokenizer and template."""
    from kolotune import smollm2
    from kolotune.chats.tokenizer import TOKENIZER_FILES

    folder = tmp_path_factory.mktemp("small") / "tiny"
    tiny_model("llama", folder, dtype="bfloat16", vocab_size=49152, max_position_embeddings=2048,
               tie_word_embeddings=True, pad_token_id=2)  # fmt: skip
    for path in smollm2.unpacked(reporter).iterdir():
        if path.name in (*TOKENIZER_FILES, "generation_config.json"):
            shutil.copyfile(path, folder / path.name)
    return folder
