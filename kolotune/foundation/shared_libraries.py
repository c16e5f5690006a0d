"""llama.cpp's shared libraries: where they are on this machine, and how they are loaded.

They come prebuilt with xllamacpp, whose module exports llama.cpp's and ggml's C functions on Linux and macOS, but not
on Windows. The libraries in the folder `LLAMA_CPP_DIR`, a user's own llama.cpp or one of its releases, come first. What
is called, and how, is declared in `kolotune.llamacpp.library`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import hardware
from .errors import ToolchainError
from .installation import INSTALL_LOCAL
from .waiting_threads import SHORT_WAITS

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"
BUILD = "b11549"
"""The build of llama.cpp that the package has; its releases have the same."""

_VARIABLE = "LLAMA_CPP_DIR"
_FOLDERS = (".", "build/bin", "bin", "lib", "build/bin/Release")  # below it, as built or as released
_ENDINGS = {"win32": ".dll", "darwin": ".dylib"}
_OPENMP = "libgomp.so.1"
_SPINS = "GOMP_SPINCOUNT"


@dataclass(frozen=True)
class SharedLibraries:
    """Shared libraries that have all functions together.

    Attributes:
        origin: what they belong to, for messages.
        files: in the order in which they are loaded.
        has_backends: code for processors is in further files beside them, from which the library chooses.
    """

    origin: str
    files: tuple[Path, ...]
    has_backends: bool = False


def own_folder() -> Path | None:
    """Return the user's own llama.cpp; None when LLAMA_CPP_DIR is not set."""
    folder = os.environ.get(_VARIABLE)
    return Path(folder).expanduser().absolute() if folder else None


def own_file(*names: str) -> Path | None:
    """Return the first of these files in the user's own llama.cpp, wherever a build or a release puts it."""
    root = own_folder()
    candidates = [root / folder / name for name in names for folder in _FOLDERS] if root is not None else []
    return next((path for path in candidates if path.is_file()), None)


def own_program(name: str) -> Path | None:
    """Return a program of the user's own llama.cpp, such as "llama-server"; None where it has none."""
    return own_file(f"{name}.exe", name)


def is_own() -> bool:
    """Whether the user's own llama.cpp has libraries, which are then used."""
    return _own() is not None


def faster_one() -> str:
    """Return what to do for a llama.cpp that uses more of this processor than the package's; "" if there is none."""
    if not hardware.has_avx512():
        return ""
    return (
        f"it uses AVX2 alone; one that is built for this processor, which has AVX-512, reads prompts up to twice as "
        f"fast: build {BUILD} with -DBUILD_SHARED_LIBS=ON and set {_VARIABLE} to its folder"
    )


def find() -> SharedLibraries:
    """Return the libraries that are used; none is loaded.

    Raises:
        ToolchainError: there are none, or those of the package are of another version.
    """
    libraries = _own() or (_of_package() if sys.platform != "win32" else None) or _of_llama_cpp_python()
    if libraries is not None:
        return libraries
    if sys.platform == "win32":
        raise ToolchainError(
            "llama.cpp's functions can't be called: on Windows the package xllamacpp does not export them",
            f"Unpack llama.cpp's release {BUILD} for Windows (llama-{BUILD}-bin-win-cpu-x64.zip) and set {_VARIABLE} "
            "to its folder.",
        )
    raise ToolchainError(f"{PACKAGE} is not installed", f"To install it, {INSTALL_LOCAL}.")


@functools.cache
def load() -> tuple[Any, ...]:
    """Load the libraries, for the rest of the process.

    Raises:
        ToolchainError: there are none, or they can't be loaded.
    """
    libraries = find()
    try:
        loaded = tuple(_loaded(file) for file in libraries.files)
    except OSError as error:
        raise ToolchainError(f"{libraries.origin} can't be loaded: {error}") from None
    if libraries.has_backends:
        load_backends = function_in(loaded, "ggml_backend_load_all_from_path")
        if load_backends is not None:
            load_backends.argtypes, load_backends.restype = [ctypes.c_char_p], None
            load_backends(os.fsencode(libraries.files[-1].parent))
    return loaded


def function_in(libraries: tuple[Any, ...], name: str) -> Any:
    """Return the function of that name; None when no library has it."""
    return next((getattr(library, name) for library in libraries if hasattr(library, name)), None)


def provide_openmp() -> None:
    """Load OpenMP's library, which what is loaded later then finds by name.

    Where the system has none, as in slim containers, it is PyTorch's copy. Its threads wait for each other over a
    thousand times for one token. By default they spin for milliseconds, in which a thread that another program has
    displaced can't run: beside several busy programs, two cores made 0.4 tokens per second instead of 12.
    """
    if sys.platform != "linux":
        return
    is_set = any(name in os.environ for name in (_SPINS, "OMP_WAIT_POLICY"))
    if not is_set:
        os.environ[_SPINS] = SHORT_WAITS[_SPINS]
    try:
        _load_openmp()
    finally:
        if not is_set:
            del os.environ[_SPINS]  # it is read once; child processes choose for themselves


def _load_openmp() -> None:
    try:
        ctypes.CDLL(_OPENMP)
    except OSError:
        package = importlib.util.find_spec("torch")
        folders = package.submodule_search_locations if package else None
        for folder in folders or ():
            file = Path(folder, "lib", _OPENMP)
            if file.is_file():
                ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def _loaded(file: Path) -> Any:
    if sys.platform == "win32":
        os.add_dll_directory(str(file.parent))
    provide_openmp()
    return ctypes.CDLL(str(file))


def _own() -> SharedLibraries | None:
    """Return the libraries in LLAMA_CPP_DIR."""
    main = own_file(_file_name("llama"))
    return None if main is None else _in_folder(main.parent, f"the llama.cpp in {_VARIABLE}={own_folder()}")


def _file_name(name: str) -> str:
    return f"{'' if sys.platform == 'win32' else 'lib'}{name}{_ENDINGS.get(sys.platform, '.so')}"


def _in_folder(folder: Path, origin: str) -> SharedLibraries:
    paths = [folder / _file_name(name) for name in ("ggml-base", "ggml-cpu", "ggml", "llama")]
    files = tuple(path for path in paths if path.is_file())
    return SharedLibraries(origin, files, has_backends=folder / _file_name("ggml-cpu") not in files)


def require_processor() -> None:
    """Raise `ToolchainError` where code of the package would end in an illegal instruction."""
    if hardware.lacks_avx2():
        raise ToolchainError(
            f"the prebuilt llama.cpp of {PACKAGE} needs a processor with AVX2, and this one has none",
            f"Build llama.cpp {BUILD} on this machine with -DBUILD_SHARED_LIBS=ON, and set {_VARIABLE} to its folder.",
        )


def _of_package() -> SharedLibraries | None:
    """Return the module of xllamacpp, which has everything in one file."""
    folder = _package_folder(PACKAGE)
    files = sorted(folder.glob(f"{PACKAGE}*.so")) if folder is not None else []
    if not files:
        return None
    version = importlib.metadata.version(PACKAGE)
    if version != VERSION:
        raise ToolchainError(
            f"{PACKAGE} is version {version}, but kolotune needs {VERSION}",
            f"Install the pinned version: pip install {PACKAGE}=={VERSION}",
        )
    require_processor()
    return SharedLibraries(f"{PACKAGE} {version}", (files[0],))


def _of_llama_cpp_python() -> SharedLibraries | None:
    """Return the libraries of llama-cpp-python, which has the same functions, where a user has installed it."""
    folder = _package_folder("llama_cpp")
    if folder is None or not (folder / "lib").is_dir():
        return None
    libraries = _in_folder(folder / "lib", "llama-cpp-python")
    return libraries if len(libraries.files) > 1 else None


def _package_folder(name: str) -> Path | None:
    """Return the folder of an installed package, which is not imported."""
    try:
        package = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return next((Path(path) for path in (package.submodule_search_locations or ())), None) if package else None
