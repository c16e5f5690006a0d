"""kolotune with what Python has on Windows and macOS: every module can be imported, and verbs do their work.

Nothing here has run on these systems; `support.other_systems` says what it shows instead.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import other_systems

from kolotune.foundation.errors import ToolchainError
from kolotune.run_folder.layout import RunFolder

# torchtune's environment has other packages; the rest are programs.
IMPORT_ALL = """
import importlib, pkgutil, kolotune
names = ["kolotune"] + [each.name for each in pkgutil.walk_packages(kolotune.__path__, "kolotune.")]
names = [name for name in names if ".torchtune.inside." not in name and not name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(params=["win32", "darwin"])
def system(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def python(tmp_path: Path, system: str) -> Call:
    """Return a function that runs Python with kolotune as on that system, in it and in the processes that it starts."""
    start = tmp_path / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(other_systems.sitecustomize(system), encoding="utf-8")

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(start), *sys.path])}
        argv = [sys.executable, "-P", *map(str, arguments)]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    return call


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import fcntl", ModuleNotFoundError),
        ("from resource import setrlimit", ModuleNotFoundError),
        ("from signal import SIGKILL", ImportError),
        ("import os; os.getpid(); os.fork()", AttributeError),
        ("import os; os.memfd_create('a')", AttributeError),
        ("import os; os.open('.', os.O_RDONLY)", PermissionError),
        ("import signal; signal.setitimer", AttributeError),
        ("import socket; socket.AF_UNIX", AttributeError),
        ("import os, sys; assert (os.name, sys.platform) == ('posix', 'linux')", AssertionError),
    ],
)
def test_what_windows_does_not_have_would_be_seen(tmp_path: Path, source: str, error: type[Exception]) -> None:
    file = tmp_path / "module.py"
    file.write_text(source, encoding="utf-8")
    loader = other_systems.Loader("module", str(file), "win32")
    spec = importlib.util.spec_from_file_location("module", file, loader=loader)
    assert spec is not None and spec.loader is not None
    with pytest.raises(error):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_module_can_be_imported(python: Call, system: str) -> None:
    seen = python("-c", "from kolotune.runners import signals; print(signals.sys.platform, *signals.detached())")
    assert seen.stdout.split() == [system, "creationflags" if system == "win32" else "start_new_session"]
    done = python("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


@pytest.mark.parametrize("system", ["win32", pytest.param("darwin", marks=pytest.mark.slow)], indirect=True)
def test_check_plan_and_status(python: Call, system: str, run_copy: RunFolder, tiny_base: Path) -> None:
    chats = run_copy.root.parent / "chats.jsonl"
    checked = python("-m", "kolotune", "check", chats, "--base-model", tiny_base)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "in 3 chats" in checked.stdout
    planned = python("-m", "kolotune", "plan", chats, "--base-model", tiny_base, "--output-dir", "new")
    assert "of memory" in planned.stdout
    if system == "win32":  # where llama.cpp's own libraries, which are not here, say how large a quantization gets
        assert planned.returncode == ToolchainError.exit_code and "LLAMA_CPP_DIR" in planned.stderr
    else:
        assert (planned.returncode, planned.stderr) == (0, "")
    status = python("-m", "kolotune", "status", run_copy.root)
    assert (status.returncode, status.stderr) == (0, "")
    assert status.stdout.count("done") == 6
