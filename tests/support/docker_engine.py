"""A real Docker engine for tests, with an image made by `kolotune container build` and a container.

Needs root. The engine's data folder is kept between runs (KOLOTUNE_TEST_CACHE, or the user's cache), so that
unchanged layers are not built again. No image comes from a registry: debootstrap makes the base.
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
    """Read the output of a run until its first training step is done."""
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if re.match(r"\s*training \d+/", line):
            return
    pytest.fail(f"it ended too early: {''.join(lines)}")


def read_until(child: subprocess.Popen[str], phrase: str) -> str:
    """Read the output of a client until a line contains a phrase; return that line."""
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if phrase in line:
            return line
    pytest.fail(f"it ended too early: {''.join(lines)}")


def require_error(output: str, *phrases: str) -> None:
    """Check that the output contains one error with these phrases, and no traceback."""
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    for phrase in phrases:
        assert phrase in output, output


def _has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@dataclass
class Dockerd:
    """dockerd, which tests can stop and start.

    Attributes:
        folder: for its socket and log; short, because the path of a socket must be.
        data: the folder of images, containers and volumes.
    """

    folder: Path
    data: Path
    _daemon: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.folder}/d.sock"

    def start(self) -> None:
        """Start it and wait until it answers."""
        argv = [
            "dockerd", "--data-root", str(self.data), "--exec-root", str(self.folder / "exec"), "-H", self.host,
            "--pidfile", str(self.folder / "pid"), "--iptables=false", "--bridge=none", "--storage-driver=overlay2",
        ]  # fmt: skip
        for name in ("d.sock", "pid", "exec/containerd/containerd.pid"):  # of a killed one
            (self.folder / name).unlink(missing_ok=True)
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
        return self._daemon is not None and self._daemon.poll() is None

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop it: properly, with all containers, or with SIGKILL."""
        assert self._daemon is not None
        helpers = psutil.Process(self._daemon.pid).children()
        self._daemon.send_signal(how)
        self._daemon.wait(60)
        while not all(map(_has_ended, helpers)):
            time.sleep(0.05)


@dataclass(frozen=True)
class Client:
    """kolotune, as a user of that engine calls it."""

    engine: Dockerd
    api: Any = field(repr=False)

    @property
    def folder(self) -> Path:
        return self.engine.folder

    def env(self, **more: str) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": self.engine.host, **more}

    def start(self, *arguments: Any, cwd: Path, **env: str) -> subprocess.Popen[str]:
        """Start kolotune without waiting for it."""
        return subprocess.Popen(
            [*PROGRAM, *map(str, arguments)],
            cwd=cwd,
            env=self.env(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __call__(self, *arguments: Any, cwd: Path, stdin: str = "", **env: str) -> tuple[int, str]:
        """Run kolotune; return the exit code and its output."""
        child = self.start(*arguments, cwd=cwd, **env)
        output, _ = child.communicate(stdin, timeout=570)
        return child.returncode, output

    def bring_up(self, name: str, *more: str) -> None:
        """Start a container, and make it first if it does not exist."""
        code, output = self("container", "start", name, "--network", "host", *more, cwd=self.folder)
        assert code == 0, output

    def processes(self, name: str = NAME) -> list[str]:
        """Return the command lines inside a container, except those that keep it running."""
        lines = [row[-1] for row in self.api.top(name, "-eo pid,args")["Processes"]]
        return [line for line in lines if "docker-init" not in line and line != "sleep infinity"]

    def idle_within(self, seconds: float, name: str = NAME) -> bool:
        """Whether all of our processes inside end within some seconds."""
        deadline = time.monotonic() + seconds
        while remaining := self.processes(name):
            if time.monotonic() > deadline:
                print("left behind:", remaining)
                return False
            time.sleep(0.1)
        return True

    def inside(self, *argv: str, name: str = NAME, user: str = "") -> str:
        """Run a program inside a container; return its output."""
        process = self.api.exec_create(name, list(argv), user=user)
        return bytes(self.api.exec_start(process["Id"])).decode()

    def forget(self, name: str) -> None:
        """Remove a container and its volume, if they exist."""
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


def skip_reason() -> str:
    if os.name != "posix" or os.geteuid() != 0:
        return "a Docker engine of our own needs root on Linux"
    missing = [name for name in ("dockerd", "debootstrap") if shutil.which(name) is None]
    return f"needs {' and '.join(missing)}: apt-get install docker.io debootstrap" if missing else ""


@contextlib.contextmanager
def engine() -> Iterator[Client]:
    """Run an engine while the block runs."""
    import docker

    data = _cache() / "data"
    data.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kolo-", dir="/tmp"))
    daemon = Dockerd(folder, data)
    daemon.start()
    try:
        api = docker.APIClient(base_url=daemon.host, version="auto", timeout=120)
        yield Client(daemon, api)
        api.close()
    finally:
        daemon.end()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Client]:
    """An engine that runs during all tests."""
    if why := skip_reason():
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
    """Return a folder with this machine's large wheels, so that builds don't download PyTorch for GPUs."""
    pins = [line for line in _LOCK.read_text().splitlines() if line.startswith("torch==")]
    folder = _cache() / "wheels" / "-".join(pins)
    if not folder.is_dir():
        partial = folder.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(partial), *pins]
        subprocess.run(argv, check=True)
        partial.rename(folder)
    return folder


def build(client: Client) -> None:
    """Build the image of this kolotune."""
    if not client.api.images(BASE, quiet=True):
        _make_base(client.api)
    code, output = client("container", "build", *build_arguments(), cwd=client.folder)
    assert code == 0, output


def build_arguments() -> list[str]:
    """Return the options of `kolotune container build` on this machine."""
    return ["--base", BASE, "--wheels", str(wheels()), "--network", "host", *certificates()]


def certificates() -> list[str]:
    """Return the option with which pip inside trusts this machine's certificates."""
    bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
    return ["--ca-bundle", bundle] if bundle else []


@pytest.fixture(scope="session")
def image(docker_engine: Client) -> Client:
    """The engine, with the image of this kolotune."""
    build(docker_engine)
    return docker_engine


@pytest.fixture(scope="session")
def container(image: Client) -> Iterator[Client]:
    """The engine, with a new, running container."""
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
