"""The C++ compiler of this machine, which the training step on a CPU is compiled with where there is one."""

from __future__ import annotations

import os
import shutil

PACKAGE = "ziglang"
"""The Python package of a compiler, Clang, for machines without one: the extra `compiler`."""


def system_compiler() -> str | None:
    """Return the program that CXX names, or else c++ or g++; None: there is none."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
