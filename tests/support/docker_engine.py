"""A real Docker engine for tests, with an image that `kolotune container build` made and a container of it.

Needs root. The engine's data folder is kept between runs (KOLOTUNE_TEST_CACHE, or the user's cache), so that only
what has changed is built again. No image comes from a registry: the base is made with debootstrap.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

PROGRAM = [sys.executable, "-m", "kolotune"]
BASE = "kolotune-tests/python:bookworm"
NAME = "kolo_container"
_START_SECONDS = 60.0
_LOCK = Path(__file__).parents[2] / "kolotune" / "runners" / "container" / "image" / "requirements.lock"


def until_training(child: subprocess.Popen[str]) -> None:
    """Reads what a run says until its first step is done."""
    assert child.stdout is not None
    seen = []
    for line in child.stdout:
        seen.append(line)
        if re.match(r"\s*training \d+/", line):
            return
    pytest.fail(f"it ended by itself: {''.join(seen)}")


def until_said(child: subprocess.Popen[str], words: str) -> str:
    """Reads what a client says until a line with these words; returns that line."""
    assert child.stdout is not None
    seen = []
    for line in child.stdout:
        seen.append(line)
        if words in line:
            return line
    pytest.fail(f"it ended by itself: {''.join(seen)}")


def told(output: str, *words: str) -> None:
    """Checks that one error was told, with these words, and no traceback."""
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    for word in words:
        assert word in output, output


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Engine:
    """dockerd, which can be stopped and started again while tests run.

    Attributes:
        folder: for its socket and log; short, because a socket's path may not be long.
        data: where it keeps images, containers and volumes.
    """

    folder: Path
    data: Path
    _daemon: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.folder}/d.sock"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        argv = [
            "dockerd", "--data-root", str(self.data), "--exec-root", str(self.folder / "exec"), "-H", self.host,
            "--pidfile", str(self.folder / "pid"), "--iptables=false", "--bridge=none", "--storage-driver=overlay2",
        ]  # fmt: skip
        for left in ("d.sock", "pid", "exec/containerd/containerd.pid"):  # by one that was killed
            (self.folder / left).unlink(missing_ok=True)
        with (self.folder / "log").open("a") as log:
            self._daemon = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd did not start: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.1)

    def _answers(self) -> bool:
        import docker

        try:
            return bool(docker.APIClient(base_url=self.host, version="auto").ping())
        except docker.errors.DockerException:
            return False

    def is_up(self) -> bool:
        """Whether it runs."""
        return self._daemon is not None and self._daemon.poll() is None

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends it: in order, with all containers, or by SIGKILL."""
        assert self._daemon is not None
        helpers = psutil.Process(self._daemon.pid).children()
        self._daemon.send_signal(how)
        self._daemon.wait(60)
        while not all(map(_has_ended, helpers)):
            time.sleep(0.05)


@dataclass(frozen=True)
class Client:
    """kolotune as a user of that engine calls it."""

    engine: Engine
    api: Any = field(repr=False)

    @property
    def folder(self) -> Path:
        return self.engine.folder

    def env(self, **more: str) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": self.engine.host, **more}

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

    def bring_up(self, name: str, *more: str) -> None:
        """Makes a container of the image, or starts it again."""
        code, output = self("container", "start", name, "--network", "host", *more, cwd=self.folder)
        assert code == 0, output

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


def why_not() -> str:
    if os.name != "posix" or os.geteuid() != 0:
        return "a Docker engine of our own needs root on Linux"
    missing = [name for name in ("dockerd", "debootstrap") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)}: apt-get install docker.io debootstrap" if missing else ""


@contextlib.contextmanager
def engine() -> Iterator[Client]:
    """An engine that runs as long as the block does."""
    import docker

    data = _cache() / "data"
    data.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kolo-", dir="/tmp"))
    started = Engine(folder, data)
    started.start()
    try:
        api = docker.APIClient(base_url=started.host, version="auto", timeout=120)
        yield Client(started, api)
        api.close()
    finally:
        started.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Client]:
    """An engine that runs while the tests do."""
    if why := why_not():
        (pytest.fail if os.environ.get("KOLOTUNE_NEEDS_DOCKER") == "1" else pytest.skip)(why)
    with engine() as client:
        yield client


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


def build(client: Client) -> None:
    """Builds the image of this kolotune."""
    if not client.api.images(BASE, quiet=True):
        _make_base(client.api)
    code, output = client("container", "build", *build_arguments(), cwd=client.folder)
    assert code == 0, output


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
    build(docker_engine)
    return docker_engine


@pytest.fixture(scope="session")
def container(image: Client) -> Iterator[Client]:
    """The engine, with a fresh container that runs."""
    image.forget(NAME)
    image.bring_up(NAME)
    yield image
    image.forget(NAME)


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], reporter: Any) -> Path:
    """A random Llama of 2 layers with SmolLM2's tokenizer and template."""
    from kolotune.base_models import packaged_model
    from kolotune.chats.tokens.tokenizer import TOKENIZER_FILES

    folder = tmp_path_factory.mktemp("small") / "tiny"
    tiny_model("llama", folder, dtype="bfloat16", vocab_size=49152, max_position_embeddings=2048,
               tie_word_embeddings=True, pad_token_id=2)  # fmt: skip
    for path in packaged_model.unpack(reporter).iterdir():
        if path.name in (*TOKENIZER_FILES, "generation_config.json"):
            shutil.copyfile(path, folder / path.name)
    return folder
