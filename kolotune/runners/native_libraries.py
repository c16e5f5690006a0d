"""C++ of our own, compiled for this machine's processor once, into the cache.

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

from . import local

_FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fPIC", "-fno-exceptions", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros",
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


@dataclass(frozen=True)
class NativeLibrary:
    """A library that may be compiled.

    Attributes:
        source: its C++ file; headers beside it belong to it.
        purpose: what it computes, for an error message.
        instead: what the user can do without it.
        flags: of the compiler, beside those that all have.
        has_threads: whether it calls OpenMP's functions.
    """

    source: Path
    purpose: str
    instead: str
    flags: tuple[str, ...] = ()
    has_threads: bool = False

    def reason_unavailable(self) -> str:
        """Return why it can't be compiled here; "" when it probably can."""
        if platform.system() != _LINUX:
            return "it is not Linux"
        if find_compiler() is None:
            return "there is no C++ compiler"
        return "PyTorch's OpenMP library is not found" if self.has_threads and _openmp() is None else ""

    def ensure(self) -> Path:
        """Return the compiled library; compile it when it is missing.

        Raises:
            ToolchainError: it can't be compiled.
        """
        library, reason = self._path(), self.reason_unavailable()
        if library is None:
            raise ToolchainError(f"{self.purpose} can't be compiled: {reason}", f"{self.instead}.")
        if library.is_file():
            return library
        library.parent.mkdir(parents=True, exist_ok=True)
        log = library.with_suffix(".log")
        with replacing(library) as partial:
            partial_object = partial.with_suffix(".o")
            for argv in self._commands(partial_object, partial):
                if local.run(argv, log=log) != 0:
                    partial_object.unlink(missing_ok=True)
                    raise ToolchainError(
                        f"{self.purpose} can't be compiled: {local.last_lines(log)}",
                        f"{self.instead}; the compiler's output is in {log}.",
                    )
            partial_object.unlink()
        log.unlink(missing_ok=True)
        return library

    def compiled(self) -> Path | None:
        """Return the library if it is already compiled."""
        library = self._path()
        return library if library is not None and library.is_file() else None

    def _commands(self, into_object: Path, into: Path) -> tuple[list[str], list[str]]:
        compiler = find_compiler()
        assert compiler is not None
        # Link PyTorch's own OpenMP: two of them in one process would compete for the cores.
        threads = [str(_openmp())] if self.has_threads else []
        return (
            [*compiler.compiles, *_FLAGS, *self.flags, "-c", str(self.source), "-o", str(into_object)],
            [*compiler.links, "-shared", str(into_object), *threads, "-o", str(into)],
        )

    def _path(self) -> Path | None:
        """Return where the library is when it is compiled, by all that its machine code depends on."""
        compiler = find_compiler()
        if self.reason_unavailable() or compiler is None:
            return None
        about_processor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        kept = [line for line in about_processor.splitlines() if line.startswith(("model name", "flags", "Features"))]
        files = (self.source, *sorted(self.source.parent.glob("*.h")))
        sources = (each.read_text(encoding="utf-8") for each in files)
        threads = str(_openmp()) if self.has_threads else ""
        parts = (*sources, " ".join(_FLAGS + self.flags), compiler.version, threads, *sorted(set(kept)))
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        return cache_folder("kernels") / f"{digest}.so"


def find_compiler() -> Compiler | None:
    """Return the compiler that CXX names, the system's, or that of a Python package; None: there is none."""
    program = system_compiler()
    if program is not None:
        resolved = Path(program).resolve()
        return Compiler((program,), (program,), f"{resolved.name} {resolved.stat().st_mtime_ns}")
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    # By its linker alone: its compiler would first compile libraries of its own, for half a minute. What is used of C's
    # is in the process that loads the library.
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
