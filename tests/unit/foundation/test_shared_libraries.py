"""llama.cpp's shared libraries: the package's, a user's own, or none."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kolotune.foundation import hardware, shared_libraries
from kolotune.foundation.errors import ToolchainError
from kolotune.llamacpp import server_library

BUILT = ("libggml-base.so", "libggml-cpu.so", "libggml.so", "libllama.so")


def files(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return [folder / name for name in names]


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_the_package_is_pinned_and_has_the_functions() -> None:
    found = shared_libraries.find()
    assert found.origin == f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    assert [path.name for path in found.files] == ["xllamacpp.abi3.so"] and not found.has_backends
    assert shared_libraries.function_in(shared_libraries.load(), "llama_decode") is not None
    assert shared_libraries.function_in(shared_libraries.load(), "llama_no_such") is None


def test_what_the_package_lacks() -> None:
    """So `gguf.quantizer` chooses types and calls ggml for the blocks; what comes, it can be compared with."""
    libraries = shared_libraries.load()
    has = {name for name in ("llama_model_quantize", "ggml_quantize_chunk", "llama_get_logits")
           if shared_libraries.function_in(libraries, name) is not None}  # fmt: skip
    assert has == {"ggml_quantize_chunk", "llama_get_logits"}


def test_another_version_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.9.11063")
    with pytest.raises(ToolchainError, match="needs 2026") as raised:
        shared_libraries.find()
    assert "pip install xllamacpp==" in raised.value.hint


@pytest.mark.skipif(sys.platform != "linux", reason="names of files")
def test_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert shared_libraries.find().origin.startswith("xllamacpp"), "a folder with the converter alone"
    built = files(tmp_path / "build" / "bin", *BUILT, "llama-quantize")
    found = shared_libraries.find()
    assert found.files == tuple(built[:4]) and not found.has_backends
    assert str(tmp_path) in found.origin
    assert shared_libraries.own_program("llama-quantize") == built[4]
    released = files(tmp_path, "libggml-base.so", "libggml-cpu-haswell.so", "libggml.so", "libllama.so")
    found = shared_libraries.find()
    assert found.files == (released[0], released[2], released[3]) and found.has_backends
    with pytest.raises(ToolchainError, match=r"the llama.cpp in LLAMA_CPP_DIR=.* can't be loaded"):
        shared_libraries.load.__wrapped__()


def test_a_processor_without_avx2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hardware, "_cpu_text", lambda: "flags : fpu sse2 avx")
    with pytest.raises(ToolchainError, match="needs a processor with AVX2") as raised:
        shared_libraries.find()
    assert "LLAMA_CPP_DIR" in raised.value.hint and shared_libraries.BUILD in raised.value.hint
    with pytest.raises(ToolchainError, match="needs a processor with AVX2"):
        server_library.load()
    if sys.platform == "linux":
        monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
        files(tmp_path, *BUILT)
        assert str(tmp_path) in shared_libraries.find().origin


@pytest.mark.parametrize(
    ("text", "is_faster"),
    [("flags : sse2 avx2", False), ("flags : sse2 avx2 avx512f", True), ("Features : asimd", False)],
)
def test_what_is_faster_than_the_package(text: str, is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_cpu_text", lambda: text)
    assert bool(shared_libraries.faster_one()) == is_faster
    assert shared_libraries.find()


@pytest.mark.skipif(sys.platform != "linux", reason="another library for threads")
@pytest.mark.parametrize(("given", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7")], ids=["unset", "set"])
def test_threads_do_not_spin_for_long(given: dict[str, str], spins: str) -> None:
    program = (
        "import os; from kolotune.foundation import shared_libraries as s; s.provide_openmp();"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**env, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
    assert done.stdout.strip() == str(given.get("GOMP_SPINCOUNT"))


def test_nothing_there(no_package: None) -> None:
    with pytest.raises(ToolchainError, match="xllamacpp is not installed") as raised:
        shared_libraries.find()
    assert "pip install" in raised.value.hint


def test_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There the package's module exports nothing but its own start."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(shared_libraries, "_of_llama_cpp_python", lambda: None)
    with pytest.raises(ToolchainError, match="on Windows") as raised:
        shared_libraries.find()
    assert "LLAMA_CPP_DIR" in raised.value.hint and shared_libraries.BUILD in raised.value.hint
    released = files(tmp_path, "ggml-base.dll", "ggml.dll", "llama.dll")
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    assert shared_libraries.find().files == tuple(released)


def test_llama_cpp_python_where_nothing_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = files(tmp_path / "llama_cpp" / "lib", *BUILT)
    monkeypatch.setattr(shared_libraries, "PACKAGE", "no_such_package")
    (tmp_path / "llama_cpp" / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert shared_libraries.find() == shared_libraries.SharedLibraries("llama-cpp-python", tuple(built))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's loader")
def test_pytorchs_openmp_where_the_system_has_none(tmp_path: Path) -> None:
    """The real libraries, with a name for OpenMP's that this system does not have."""
    package = importlib.util.find_spec("torch")
    assert package is not None and package.submodule_search_locations
    openmp = Path(package.submodule_search_locations[0], "lib", "libgomp.so.1")
    if not openmp.is_file():
        pytest.skip("this build of PyTorch has no OpenMP library of its own")
    (module,) = shared_libraries.find().files
    for source, target in ((openmp, tmp_path / "torch" / "lib" / "libgomq.so.1"), (module, tmp_path / module.name)):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes().replace(b"libgomp.so.1\0", b"libgomq.so.1\0"))
    (tmp_path / "torch" / "__init__.py").write_text("", encoding="utf-8")
    program = f"""if True:
        import ctypes, sys
        sys.path.insert(0, {str(tmp_path)!r})
        from kolotune.foundation import shared_libraries
        shared_libraries._OPENMP = "libgomq.so.1"
        if sys.argv[1] == "provided":
            shared_libraries.provide_openmp()
        ctypes.CDLL({str(tmp_path / module.name)!r}).llama_backend_init()
    """
    results = [
        subprocess.run([sys.executable, "-c", program, each], capture_output=True, text=True, check=False)
        for each in ("missing", "provided")
    ]
    shutil.rmtree(tmp_path / "torch")
    assert results[0].returncode != 0 and "libgomq.so.1" in results[0].stderr
    assert results[1].returncode == 0, results[1].stderr
