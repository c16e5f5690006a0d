"""Makes kolotune's environment from requirements.lock: ``python tools/setup_environment.py [FOLDER]``.

uv installs, since it is fast and knows PyTorch's own index; pip does where uv can't be had or fails. uv does not read
pip's configuration, so it is passed on. PyTorch's build for Linux on PyPI contains CUDA. Without an NVIDIA device it is
only taken if no other one can be had. Where there is no C++ compiler, one is installed as a package: the training step
on a CPU is compiled.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
sys.path.insert(0, str(ROOT))

_OLDEST_PYTHON = (3, 11)
# Options of pip's configuration, and uv's for the same. With several indexes pip takes the best version of all.
_OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
_VARIABLES = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY"}
_ANSWER_SECONDS = "10"  # how long PyTorch's index may take to answer
_CUDA_BUILD = (
    "there is no NVIDIA device, but no build of PyTorch without CUDA was found; its own index can't be reached.\n"
    "  Installing the build with CUDA: 2.7 GB to download, and 3.7 GB more on the disk. PIP_FIND_LINKS names a folder\n"
    "  with another one."
)
_COMPILE = "--compile-bytecode"  # as pip does, so that the first start is as quick as the next
_CUDA = re.compile(r" nvidia-")


class Environment:
    """A virtual environment, and what installs packages into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / ("Scripts" if os.name == "nt" else "bin")
        suffix = ".exe" if os.name == "nt" else ""
        self.python, self._uv = (programs / f"{name}{suffix}" for name in ("python", "uv"))
        self._options: list[str] = []
        self._env = dict(os.environ)

    def make(self) -> None:
        """Make it, if it is not there, with the program uv in it if possible."""
        if not self.python.exists():
            say(f"making {self.folder}")
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        self._read_pip_configuration()
        if not self._has_uv() and self._run_pip(["--quiet", pinned("uv")]).returncode != 0:
            say("uv can't be installed, so pip installs the packages")

    def _has_uv(self) -> bool:
        if not self._uv.exists():
            return False
        shown = subprocess.run([str(self._uv), "--version"], capture_output=True, text=True).stdout
        return shown.split()[1:2] == [pinned("uv").partition("==")[2]]

    def _read_pip_configuration(self) -> None:
        argv = [str(self.python), "-m", "pip", "config", "list"]
        listed = subprocess.run(argv, capture_output=True, text=True).stdout
        settings: dict[str, list[str]] = {}
        # As `global.find-links='a b'`. What is for `install` counts more, and what the environment says most.
        for line in sorted(
            listed.splitlines(), key=lambda line: (line.startswith(":env:"), line.startswith("install."))
        ):
            name, _, quoted = line.partition("=")
            settings[name.rpartition(".")[2]] = str(ast.literal_eval(quoted)).split()
        for option, values in settings.items():
            if option == "no-index" and values[0] not in ("0", "false"):
                self._options.append("--no-index")
            elif option in _OPTIONS:
                self._options += [f"{_OPTIONS[option]}={value}" for value in values]
            elif option in _VARIABLES and values:
                self._env.setdefault(_VARIABLES[option], values[0])
        if any(each.startswith("--index=") for each in self._options):
            self._options.append("--index-strategy=unsafe-best-match")

    def install(self, *what: str) -> None:
        """Install packages, by uv if that works; it names those that it downloads."""
        if not self._uv.exists() or self._run_uv(what).returncode != 0:
            self._run_pip([each for each in what if each != _COMPILE]).check_returncode()

    def install_if_possible(self, what: Sequence[str], otherwise: str) -> None:
        """Install packages that kolotune can do without; where they can't be had, say so."""
        try:
            self.install("--no-deps", *what)
        except subprocess.CalledProcessError:
            say(otherwise)

    def downloads_cuda(self) -> bool:
        """Whether the lock's packages bring NVIDIA's, which are not there yet."""
        asked = ["--dry-run", "-r", str(LOCK)]
        shown = self._run_uv(asked, capture=True) if self._uv.exists() else self._run_pip(asked, capture=True)
        return bool(_CUDA.search(shown.stdout + shown.stderr))

    def install_cpu_build(self) -> bool:
        """Install PyTorch from its own index; return whether that index could be reached."""
        what = ["--no-deps", "--torch-backend=cpu", pinned("torch")]
        if not self._uv.exists():
            return False
        asked = self._run_uv(["--dry-run", *what], capture=True, UV_HTTP_TIMEOUT=_ANSWER_SECONDS, UV_HTTP_RETRIES="1")
        return "+cpu" in asked.stderr and self._run_uv(what).returncode == 0

    def _run_uv(
        self, arguments: Sequence[str], capture: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        argv = [str(self._uv), "pip", "install", f"--python={self.python}", *self._options, *arguments]
        env = {**self._env, **variables}
        return subprocess.run(argv, env=env, cwd=ROOT, text=True, capture_output=capture)

    def _run_pip(self, arguments: Sequence[str], capture: bool = False) -> subprocess.CompletedProcess[str]:
        argv = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
        return subprocess.run(argv, cwd=ROOT, text=True, capture_output=capture)


def pinned(package: str) -> str:
    """Return the lock's line for a package."""
    return next(line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith(f"{package}=="))


def extra(name: str) -> list[str]:
    """Return the packages of one of the project's extras."""
    import tomllib  # older Pythons get a message

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages: list[str] = project.get("optional-dependencies", {}).get(name, [])
    return packages


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Make the environment, or bring it up to date; return the exit code."""
    if sys.version_info < _OLDEST_PYTHON:
        say(f"this is Python {sys.version.split()[0]}, and kolotune needs 3.11 or newer")
        return 1
    from kolotune.foundation import compilers, hardware

    environment = Environment(Path(arguments[0] if arguments else ".venv").absolute())
    try:
        environment.make()
        # Only PyPI's build for Linux brings CUDA; uv's own variable says which one the user wants.
        if sys.platform == "linux" and "UV_TORCH_BACKEND" not in os.environ and not hardware.has_nvidia_device():
            if environment.downloads_cuda() and not environment.install_cpu_build():
                say(_CUDA_BUILD)
        environment.install(_COMPILE, "-r", str(LOCK))
        # Elsewhere the training step is not compiled.
        if sys.platform == "linux" and compilers.system_compiler() is None and not hardware.has_nvidia_device():
            environment.install_if_possible(extra("compiler"), "there is no C++ compiler: training takes longer")
        environment.install("--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")
        say(f"ready: {environment.python.with_name('kolotune')}")
    except subprocess.CalledProcessError as error:
        say(f"failed: {' '.join(map(str, error.cmd))}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
