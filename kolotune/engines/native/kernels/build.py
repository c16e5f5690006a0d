"""Compiles `kernels.cpp` for this machine's processor and one dtype, once, into the cache.

The compiler is the system's, or else the one in a Python package: Clang, with all that it needs beside it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from kolotune.foundation.cache import cache_folder
from kolotune.foundation.compilers import PACKAGE, system_compiler
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.files import replacing
from kolotune.foundation.hardware import best_device, has_avx512, lacks_avx2
from kolotune.runners import local

_SOURCE = Path(__file__).with_name("kernels.cpp")
_SOURCES = (_SOURCE, *sorted(Path(__file__).parent.glob("*.h")))
# Sums may be reordered, so that they vectorize. NaN and infinity keep their meaning: the training loop checks for them.
_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-exceptions", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math",
)  # fmt: skip
_LINUX = "Linux"


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        compiles, links: the commands, to which files and flags are added.
        version: a text that another version doesn't have.
    """

    compiles: tuple[str, ...]
    links: tuple[str, ...]
    version: str


def reason_unavailable() -> str:
    """Return why the kernels can't be compiled here; "" when they probably can."""
    if platform.system() != _LINUX:
        return "it is not Linux"
    if find_compiler() is None:
        return "there is no C++ compiler"
    return "" if _openmp() else "PyTorch's OpenMP library is not found"


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
    reason, compiler, openmp = reason_unavailable(), find_compiler(), _openmp()
    if reason or compiler is None or openmp is None:
        raise ToolchainError(f"the training step can't be compiled: {reason}", "Train with --compile off.")
    library = cache_folder("kernels") / f"{_digest(compiler, openmp, dtype)}.so"
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    log = library.with_suffix(".log")
    with replacing(library) as partial:
        partial_object = partial.with_suffix(".o")
        # Link PyTorch's own OpenMP: two of them in one process would compete for the cores.
        commands = (
            [*compiler.compiles, *_FLAGS, f"-DONLY_{dtype.upper()}", "-c", str(_SOURCE), "-o", str(partial_object)],
            [*compiler.links, "-shared", str(partial_object), str(openmp), "-o", str(partial)],
        )
        for argv in commands:
            if local.run(argv, log=log) != 0:
                partial_object.unlink(missing_ok=True)
                raise ToolchainError(
                    f"the training step can't be compiled: {local.last_lines(log)}",
                    f"Train with --compile off; the compiler's output is in {log}.",
                )
        partial_object.unlink()
    log.unlink(missing_ok=True)
    return library


def compiled(dtype: str) -> Path | None:
    """Return the library for "bf16" or "fp32" if it is already compiled."""
    compiler, openmp = find_compiler(), _openmp()
    if reason_unavailable() or compiler is None or openmp is None:
        return None
    library = cache_folder("kernels") / f"{_digest(compiler, openmp, dtype)}.so"
    return library if library.is_file() else None


def find_compiler() -> Compiler | None:
    """Return the compiler that CXX names, the system's, or that of a Python package; None: there is none."""
    program = system_compiler()
    if program is not None:
        resolved = Path(program).resolve()
        return Compiler((program,), (program,), f"{resolved.name} {resolved.stat().st_mtime_ns}")
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    # By its linker alone: its compiler would first compile libraries of its own, for half a minute. What is used of C's
    # is in the process that loads the kernels.
    package = (sys.executable, "-m", PACKAGE)
    return Compiler((*package, "c++"), (*package, "ld.lld"), f"{PACKAGE} {importlib.metadata.version(PACKAGE)}")


def _openmp() -> Path | None:
    """Find the OpenMP library that PyTorch brings, without importing PyTorch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    home = Path(spec.origin).parent
    for folder in (home / "lib", home.parent / "torch.libs"):
        for found in sorted(folder.glob("libgomp*.so*")):
            return found
    return None


def _digest(compiler: Compiler, openmp: Path, dtype: str) -> str:
    """Return a name for the library that depends on all that its machine code does."""
    about_processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    kept = [line for line in about_processor.splitlines() if line.startswith(("model name", "flags", "Features"))]
    sources = (each.read_text(encoding="utf-8") for each in _SOURCES)
    parts = (*sources, " ".join(_FLAGS), dtype, compiler.version, str(openmp), *sorted(set(kept)))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
