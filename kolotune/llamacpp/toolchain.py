"""The pinned llama.cpp: its converter from the source archive of llama-cpp-python, its library from the wheel.

Both are of one version. `LLAMA_CPP_DIR` puts a user's own llama.cpp in place of the converter and quantizer.
"""

from __future__ import annotations

import importlib.metadata
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kolotune.base_models.downloads import cache_folder, fetch_package
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.files import replacing
from kolotune.foundation.reporter import Reporter

VERSION = "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_CONVERTER = "convert_hf_to_gguf.py"
_WANTED = (_CONVERTER, "conversion", "gguf-py", "models/templates", "models/ggml-vocab-qwen2.gguf", "LICENSE")
_FORMAT = 2  # raised when other files are wanted


@dataclass(frozen=True)
class Toolchain:
    """Where the parts of llama.cpp are.

    Attributes:
        root: the folder with the converter.
        version: of the pinned package, or "own" for a user's llama.cpp.
        quantizer: the llama-quantize program of a user's llama.cpp; None: the library's function.
    """

    root: Path
    version: str
    quantizer: Path | None = None

    @property
    def converter(self) -> Path:
        return self.root / _CONVERTER


def find() -> Toolchain | None:
    """The toolchain if it is on this machine already.

    Raises:
        ToolchainError: LLAMA_CPP_DIR is set and holds no converter.
    """
    own = os.environ.get("LLAMA_CPP_DIR")
    if own:
        root = Path(own).expanduser().absolute()
        if not (root / _CONVERTER).is_file():
            raise ToolchainError(
                f"LLAMA_CPP_DIR={root}: there is no {_CONVERTER}", "Unset it, or give a llama.cpp folder."
            )
        programs = [root / "build" / "bin" / "llama-quantize", root / "llama-quantize"]
        return Toolchain(root, "own", next((path for path in programs if path.is_file()), None))
    root = _pinned_root()
    return Toolchain(root, VERSION) if root.is_dir() else None


def ensure(reporter: Reporter) -> Toolchain:
    """The toolchain, fetched the first time.

    Raises:
        ToolchainError: the library is missing or of another version than the converter.
        OfflineError: the converter can't be downloaded.
    """
    found = find()
    if found is None or found.quantizer is None:
        check_library()
    if found is not None:
        return found
    reporter.doing("fetching llama.cpp's converter (77 MB), once")
    target = _pinned_root()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        archive = fetch_package(f"llama-cpp-python=={VERSION}", _SHA256, Path(temporary), source=True)
        with replacing(target) as partial:
            _unpack(archive, partial)
    return Toolchain(target, VERSION)


def check_library() -> str:
    """The version of the installed library.

    Raises:
        ToolchainError: it is missing, or of another version than the converter.
    """
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise ToolchainError(
            "llama-cpp-python is not installed", "Install it: pip install 'kolotune[local]'."
        ) from None
    if version != VERSION:
        raise ToolchainError(
            f"llama-cpp-python is {version}, the converter's version is {VERSION}",
            f"Install the pinned one: pip install llama-cpp-python=={VERSION}.",
        )
    return version


def templates_folder() -> Path:
    """llama.cpp's collection of chat templates of published models.

    Raises:
        ToolchainError: the toolchain has not been fetched.
    """
    found = find()
    if found is None:
        raise ToolchainError("llama.cpp's converter has not been fetched yet", "Run `kolotune doctor --fix`.")
    return found.root / "models" / "templates"


def _pinned_root() -> Path:
    return cache_folder("toolchain") / f"llama.cpp-{VERSION}-{_FORMAT}"


def _unpack(archive: Path, target: Path) -> None:
    """Takes the wanted files out of the archive; the tar filter keeps every path inside `target`."""
    prefix = PurePosixPath(f"llama_cpp_python-{VERSION}", "vendor", "llama.cpp")
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_relative_to(prefix) and any(path.relative_to(prefix).is_relative_to(each) for each in _WANTED):
                member.name = path.relative_to(prefix).as_posix()
                members.append(member)
        if not members:
            raise ToolchainError(f"{archive.name}: holds no llama.cpp", "The pinned version is wrong; report this.")
        # Python before 3.11.4 (Debian 12's) has no filters; the archive's hash is checked all the same.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        tar.extractall(target, members=members)
