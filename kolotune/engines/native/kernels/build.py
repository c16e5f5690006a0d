"""Compiles `kernels.cpp` for this machine's processor and one dtype."""

from __future__ import annotations

import platform
from pathlib import Path

from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.hardware import best_device, has_avx512, lacks_avx2
from kolotune.runners.native_libraries import NativeLibrary

# Sums may be reordered, so that they vectorize. NaN and infinity keep their meaning: the training loop checks for them.
_FLAGS = ("-fassociative-math", "-freciprocal-math")


def reason_unavailable() -> str:
    """Return why the kernels can't be compiled here; "" when they probably can."""
    return _library("fp32").reason_unavailable()


def multiplies() -> bool:
    """Return whether the kernels multiply fp32 matrices themselves: on x86-64 with AVX2 and nothing wider."""
    return not reason_unavailable() and not has_avx512() and not lacks_avx2() and platform.machine() == "x86_64"


def can_compile(dtype: str) -> bool:
    """Compile the kernels for a dtype; return whether that works and they would be used."""
    if best_device() != "cpu":
        return False
    try:
        ensure(dtype)
    except ToolchainError:
        return False
    return True


def ensure(dtype: str) -> Path:
    """Return the library compiled for "bf16" or "fp32"; compile it when it is missing.

    Raises:
        ToolchainError: it can't be compiled.
    """
    return _library(dtype).ensure()


def compiled(dtype: str) -> Path | None:
    """Return the library for "bf16" or "fp32" if it is already compiled."""
    return _library(dtype).compiled()


def _library(dtype: str) -> NativeLibrary:
    return NativeLibrary(
        Path(__file__).with_name("kernels.cpp"), "the training step", "Train with --compile off",
        (*_FLAGS, f"-DONLY_{dtype.upper()}"), has_threads=True,
    )  # fmt: skip
