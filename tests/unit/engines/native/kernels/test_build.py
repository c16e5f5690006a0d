"""The kernels are compiled once, for this processor; if they can't be, the error gives the reason."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kolotune.engines.native.kernels import build
from kolotune.foundation.errors import ToolchainError
from kolotune.runners import native_libraries

ROOT = Path(__file__).parents[5]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))
    return tmp_path / "kernels"


def test_without_a_compiler_the_kernels_are_not_chosen(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native_libraries, "PACKAGE", "no_such_package")
    assert build.reason_unavailable() == "there is no C++ compiler" and not build.can_compile("fp32")
    with pytest.raises(ToolchainError, match="no C\\+\\+ compiler"):
        build.ensure("fp32")


@pytest.mark.skipif(bool(build.reason_unavailable()), reason=f"can't be compiled: {build.reason_unavailable()}")
def test_the_kernels_are_compiled_once(empty_cache: Path) -> None:
    library = build.ensure("fp32")
    assert sorted(empty_cache.iterdir()) == [library]
    written = library.stat().st_mtime_ns
    assert build.ensure("fp32") == library and library.stat().st_mtime_ns == written


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are compiled on Linux alone")
def test_the_compiler_of_a_package(empty_cache: Path, tmp_path: Path) -> None:
    """What ziglang's compiler makes, where the system has none, passes the tests of the kernels."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    folder, nothing = tmp_path / "packages", tmp_path / "no programs"
    nothing.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, *packages["compiler"]], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment |= {"PATH": str(nothing), "PYTHONPATH": str(folder)}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "test_compiled_operations.py"]
    done = subprocess.run(tests, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "can't be compiled" not in done.stdout, done.stdout + done.stderr
    assert len(list(empty_cache.glob("*.so"))) == 2


@pytest.mark.skipif(bool(build.reason_unavailable()), reason=f"can't be compiled: {build.reason_unavailable()}")
def test_a_failing_compiler_leaves_only_its_log(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no space for objects\nexit 3\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not build.can_compile("fp32")
    with pytest.raises(ToolchainError, match="no space for objects"):
        build.ensure("fp32")
    assert [each.suffix for each in empty_cache.iterdir()] == [".log"]
