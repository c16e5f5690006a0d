"""The environment that `make setup` makes, from a folder of packages instead of an index, by the real uv and pip."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation import compilers, hardware

SCRIPT = Path(__file__).parents[3] / "tools" / "setup_environment.py"
UV = shutil.which("uv", path=sysconfig.get_path("scripts")) or shutil.which("uv")
needs_uv = pytest.mark.skipif(UV is None, reason="uv is not installed")
CUDA_HINT = "no build of PyTorch without CUDA was found"


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    """Write a package with a module that contains nothing."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{module}.py", "")
        needed = "".join(f"Requires-Dist: {each}\n" for each in needs)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with a project of its own: a lock of three packages, which a folder has, and no device."""
    spec = importlib.util.spec_from_file_location("setup_environment", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wheels, devices = tmp_path / "wheels", tmp_path / "dev"
    wheels.mkdir()
    devices.mkdir()
    wheel(wheels, "torch", "2.0.0", "nvidia-some")
    wheel(wheels, "nvidia-some", "1.0")
    wheel(wheels, "plain", "1.0")
    lock = tmp_path / "requirements.lock"
    lock.write_text("plain==1.0\ntorch==2.0.0\nuv==0.0.1\n", encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "kolotune"\nversion = "1"\n[tool.setuptools]\npackages = []\n', encoding="utf-8"
    )
    for name in [each for each in os.environ if each.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOCK", lock)
    monkeypatch.setattr(hardware, "_DEVICES", devices)
    monkeypatch.setattr(compilers, "system_compiler", lambda: "/usr/bin/c++")
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def empty(made: Path, tmp_path: Path) -> Path:
    """An environment with pip alone."""
    return Path(shutil.copytree(made, tmp_path / "venv", symlinks=True))


@pytest.fixture
def with_uv(script: Any, tmp_path: Path, empty: Path) -> Path:
    """An environment that has uv already, in the version of the lock."""
    assert UV is not None
    version = subprocess.run([UV, "--version"], capture_output=True, text=True).stdout.split()[1]
    script.LOCK.write_text(f"plain==1.0\ntorch==2.0.0\nuv=={version}\n", encoding="utf-8")
    wheel(tmp_path / "wheels", "uv", version)
    (empty / "bin" / "uv").symlink_to(UV)
    return empty


def installed(folder: Path) -> set[str]:
    """Return packages and their versions, without those that an environment begins with."""
    names = {path.name.removesuffix(".dist-info") for path in folder.rglob("*.dist-info")}
    return {name.replace("_", "-") for name in names if not name.startswith(("pip-", "setuptools-", "uv-"))}


Run = Callable[..., str]


@pytest.fixture
def set_up(script: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that sets up an environment, without kolotune in it, and returns what is printed."""
    whole = script.Environment.install

    def install(self: Any, *what: str) -> None:
        if "--editable" not in what:  # it needs setuptools, which the folder does not have
            whole(self, *what)

    monkeypatch.setattr(script.Environment, "install", install)

    def run(folder: Path, expected: int = 0) -> str:
        capfd.readouterr()
        code = script.main([str(folder)])
        captured = capfd.readouterr()
        assert code == expected, captured
        return captured.out + captured.err

    return run


@needs_uv
def test_a_build_that_pips_configuration_has_is_taken(set_up: Run, with_uv: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "torch", "2.0.0+cpu")
    output = set_up(with_uv)
    assert CUDA_HINT not in output
    assert installed(with_uv) == {"plain-1.0", "torch-2.0.0+cpu"}
    again = set_up(with_uv)
    assert "Installed" not in again and "ready" in again


@needs_uv
def test_cuda_is_announced_where_nothing_else_can_be_had(set_up: Run, with_uv: Path) -> None:
    output = set_up(with_uv)
    assert output.index(CUDA_HINT) < output.index("Installed"), "after the download"
    assert "2.7 GB" in output
    assert installed(with_uv) == {"plain-1.0", "torch-2.0.0", "nvidia-some-1.0"}


@needs_uv
def test_a_device_gets_cuda_without_a_word(set_up: Run, with_uv: Path, tmp_path: Path) -> None:
    (tmp_path / "dev" / "nvidia0").touch()
    assert CUDA_HINT not in set_up(with_uv)
    assert "torch-2.0.0" in installed(with_uv)


@needs_uv
def test_an_environment_keeps_what_it_has(set_up: Run, with_uv: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "torch", "2.0.0+cpu")
    set_up(with_uv)
    (tmp_path / "wheels" / "torch-2.0.0+cpu-py3-none-any.whl").unlink()
    assert CUDA_HINT not in set_up(with_uv)
    assert "torch-2.0.0+cpu" in installed(with_uv)


@pytest.fixture
def with_extra(with_uv: Path, tmp_path: Path) -> Path:
    """The same, for a project that has a package with a compiler among its extras."""
    with (tmp_path / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write('[project.optional-dependencies]\ncompiler = ["compiles==1.0"]\n')
    wheel(tmp_path / "wheels", "torch", "2.0.0+cpu")
    return with_uv


@needs_uv
def test_a_compiler_is_installed_where_there_is_none(
    set_up: Run, with_extra: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "system_compiler", lambda: None)
    assert "no C++ compiler: training takes longer" in set_up(with_extra), "it can't be had, and the rest is there"
    wheel(tmp_path / "wheels", "compiles", "1.0")
    set_up(with_extra)
    assert "compiles-1.0" in installed(with_extra)


@needs_uv
def test_a_compiler_of_the_system_is_enough(set_up: Run, with_extra: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "compiles", "1.0")
    set_up(with_extra)
    assert "compiles-1.0" not in installed(with_extra)


def test_without_uv_pip_installs(set_up: Run, empty: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "uv", "0.0.1")  # for a system that uv has no program for
    wheel(tmp_path / "wheels", "torch", "2.0.0+cpu")
    assert CUDA_HINT not in set_up(empty)
    assert installed(empty) == {"plain-1.0", "torch-2.0.0+cpu"}


def test_without_uv_cuda_is_announced_too(set_up: Run, empty: Path, tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "uv", "0.0.1")
    assert CUDA_HINT in set_up(empty)
    assert installed(empty) == {"plain-1.0", "torch-2.0.0", "nvidia-some-1.0"}


def test_a_package_that_is_nowhere_fails(set_up: Run, tmp_path: Path) -> None:
    output = set_up(tmp_path / "venv", 1)
    assert output.index("uv can't be installed") < output.index("setup: failed: ")


def test_pips_configuration_is_passed_on(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://a.example/simple\nfind-links = /one\ncert = /a.pem\n"
        "extra-index-url =\n    https://b.example/simple\n    https://c.example/simple\n"
        "[install]\nfind-links = /two /three\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.delenv("PIP_FIND_LINKS")
    environment = script.Environment(Path(sys.prefix))
    environment._read_pip_configuration()
    assert "--find-links=/one" not in environment._options
    assert set(environment._options) >= {  # this machine may have more
        "--default-index=https://a.example/simple", "--index=https://b.example/simple",
        "--index=https://c.example/simple", "--find-links=/two", "--find-links=/three", "--no-index",
        "--index-strategy=unsafe-best-match",
    }  # fmt: skip
    assert environment._env["SSL_CERT_FILE"] in ("/a.pem", os.environ.get("SSL_CERT_FILE"))
