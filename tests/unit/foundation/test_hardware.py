"""What is chosen for a machine."""

from __future__ import annotations

import importlib.util
import platform
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation import hardware


@pytest.fixture
def driver(monkeypatch: Any, tmp_path: Path) -> Path:
    """A place of devices in which a GPU's driver has left its mark."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(hardware, "_DEVICES", tmp_path)
    return tmp_path


def test_without_a_driver_pytorch_is_not_loaded(monkeypatch: Any, driver: Path) -> None:
    import torch

    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.best_device() == "cuda"
    (driver / "nvidia0").unlink()
    assert hardware.best_device() == "cpu"


@pytest.mark.usefixtures("driver")
def test_without_a_gpu_it_is_the_processor(monkeypatch: Any) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert hardware.best_device() == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert hardware.best_device() == "mps"
    assert hardware.best_dtype() == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.best_device() == "cuda"


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(("emulated", "dtype"), [(False, "bf16"), (True, "fp32")])
def test_a_gpu_that_only_emulates_bf16_gets_fp32(monkeypatch: Any, emulated: bool, dtype: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or not emulated
    )
    assert hardware.best_dtype() == dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: fpu sse2 avx512f avx512_bf16 amx_tile", "bf16"),
        ("flags : fpu amx_bf16", "bf16"),
        ("Features : fp asimd bf16 i8mm", "bf16"),
        ("flags : fpu sse2 avx2 avx512f", "fp32"),
        ("flags : fpu avx512_bf16x notbf16", "fp32"),
        ("", "fp32"),
    ],
)
def test_a_processor_needs_instructions_for_bf16(monkeypatch: Any, flags: str, dtype: str) -> None:
    real = Path.read_text
    monkeypatch.setattr(hardware, "best_device", lambda: "cpu")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(
        Path, "read_text", lambda self, **more: flags if str(self) == "/proc/cpuinfo" else real(self, **more)
    )
    assert hardware.best_dtype() == dtype
    assert hardware.computes_slowly_in("bf16") == (dtype == "fp32" and bool(flags))
    assert not hardware.computes_slowly_in("fp32")


def test_without_torch_and_on_other_systems_it_is_fp32(monkeypatch: Any) -> None:
    monkeypatch.setattr(hardware, "best_device", lambda: "cpu")
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert hardware.best_dtype() == "fp32"
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    monkeypatch.setattr(hardware, "best_device", lambda: pytest.fail("torch is not there"))
    assert hardware.best_dtype() == "fp32"


def test_the_kills_of_a_container_are_counted_before_those_of_the_machine(monkeypatch: Any, tmp_path: Path) -> None:
    group, machine = tmp_path / "memory.events", tmp_path / "vmstat"
    monkeypatch.setattr(hardware, "_KILL_COUNTERS", (group, machine))
    assert hardware.kills_for_memory() is None
    machine.write_text("nr_free_pages 5\noom_kill 12\n")
    assert hardware.kills_for_memory() == 12
    group.write_text("low 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 1\n")
    assert hardware.kills_for_memory() == 2


def test_a_choice_of_blas_kernel_is_known(monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert "OPENBLAS_CORETYPE" not in hardware.machine()
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert hardware.machine()["OPENBLAS_CORETYPE"] == "Haswell", "a merge has other last bits with another one"
