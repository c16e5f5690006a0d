"""What `models` and `doctor` say about this machine."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., tuple[int, str]]
TOKEN = "hf_PlantedTokenThatMustNotBeSeen"


def test_models_and_doctor(kolotune: Call, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    code, output = kolotune("models")
    assert code == 0
    assert "smollm2-135m" in output
    assert "needs a login and an approval" in output
    code, output = kolotune("doctor")
    assert code == 0
    for part in ("python", "torch", "llama.cpp library", "llama.cpp server", "torchtune", "hub token", "disk"):
        assert f"\n  {part} " in output
    assert TOKEN not in output


def test_doctor_names_what_a_processor_lacks_or_has_for_llama_cpp(monkeypatch: Any) -> None:
    from kolotune.cli import doctor
    from kolotune.foundation import hardware

    for words, state, said in (
        ("sse2 avx", "missing", "needs a processor with AVX2"),
        ("sse2 avx2", "ok", "xllamacpp"),
        ("sse2 avx2 avx512f", "ok", "up to twice as fast"),
    ):
        monkeypatch.setattr(hardware, "_cpu_text", lambda words=words: f"flags : {words}")
        _, seen, what = doctor._library()
        assert seen == state and said in what, words


@pytest.mark.parametrize(
    ("devices", "needed", "words"),
    [
        ([], ["nvidia-cudnn-cu13==9; platform_system == 'Linux'"], "with CUDA; there is no NVIDIA device"),
        (["nvidia0"], ["nvidia-cudnn-cu13==9; platform_system == 'Linux'"], ""),
        (["dxg"], ["nvidia-cudnn-cu13==9; platform_system == 'Linux'"], ""),
        (["nvidiactl"], ["filelock"], ""),
        ([], None, "; there is no NVIDIA device"),
        (["nvidia0"], None, ""),
    ],
)
def test_doctor_leads_to_the_build_of_pytorch_for_this_machine(
    devices: list[str], needed: list[str] | None, words: str, monkeypatch: Any, tmp_path: Path
) -> None:
    from kolotune.cli import doctor
    from kolotune.foundation import hardware

    for device in devices:
        (tmp_path / device).touch()
    monkeypatch.setattr(hardware, "_DEVICES", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    if needed is None:
        monkeypatch.setattr(doctor, "_package", lambda name: (name, "missing", "pip install"))
    name, state, what = doctor._torch()
    assert (name, state) == ("torch", "missing" if needed is None else "ok")
    assert words in what and ("--torch-backend=cpu" in what) == bool(words)


def test_doctor_on_torchtune(kolotune: Call, monkeypatch: Any, tmp_path: Path) -> None:
    """Not there yet is nothing missing; a variable that names nothing is."""
    from kolotune.cli.doctor import _engine_environments

    monkeypatch.setenv("KOLOTUNE_CACHE", str(tmp_path))
    ((name, state, what),) = _engine_environments()
    assert (name, state) == ("torchtune", "none") and "python -m kolotune.engines.torchtune.environment" in what
    monkeypatch.setenv("KOLOTUNE_TORCHTUNE", str(tmp_path / "nowhere"))
    assert [state for _, state, _ in _engine_environments()] == ["missing"]


@pytest.mark.skipif(sys.platform != "linux", reason="the training step is compiled on Linux alone")
def test_doctor_says_what_compiles_the_training_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kolotune.cli import doctor
    from kolotune.foundation import compilers, hardware

    monkeypatch.setattr(hardware, "_DEVICES", tmp_path)
    monkeypatch.setattr(compilers, "system_compiler", lambda: "/opt/c++")
    assert list(doctor._compiler()) == [("C++ compiler", "ok", "/opt/c++")]
    monkeypatch.setattr(compilers, "system_compiler", lambda: None)
    monkeypatch.setattr(compilers, "PACKAGE", "pytest")  # one that is there
    assert [row[1:] for row in doctor._compiler()] == [("ok", "the package pytest")]
    monkeypatch.setattr(compilers, "PACKAGE", "no_such_package")
    (row,) = doctor._compiler()
    assert row[1] == "none" and ".[compiler]" in row[2]
