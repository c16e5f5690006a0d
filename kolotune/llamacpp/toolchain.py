"""The pinned llama.cpp: the converter from llama-cpp-python's source archive, the library from its wheel.

Both have the same version. With `LLAMA_CPP_DIR`, a user's own llama.cpp replaces converter and quantizer.
"""

from __future__ import annotations

import importlib.metadata
import os
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kolotune.base_models.downloads import download_package
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.files import replacing
from kolotune.foundation.installation import INSTALL_LOCAL
from kolotune.foundation.reporter import Reporter

VERSION = "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_CONVERTER = "convert_hf_to_gguf.py"
_UNPACKED = (_CONVERTER, "conversion", "gguf-py", "models/templates", "models/ggml-vocab-qwen2.gguf", "LICENSE")
_FORMAT = 2  # raised when the list of unpacked files changes


@dataclass(frozen=True)
class Toolchain:
    """Paths of llama.cpp's parts.

    Attributes:
        root: the converter's folder.
        version: of the pinned package, or "own" for a user's llama.cpp.
        quantizer: a user's own llama-quantize program; None for the library's function.
    """

    root: Path
    version: str
    quantizer: Path | None = None

    @property
    def converter(self) -> Path:
        return self.root / _CONVERTER


def find() -> Toolchain | None:
    """Return the toolchain if it is on this machine; None otherwise.

    Raises:
        ToolchainError: LLAMA_CPP_DIR is set, but has no converter.
    """
    own = os.environ.get("LLAMA_CPP_DIR")
    if own:
        root = Path(own).expanduser().absolute()
        if not (root / _CONVERTER).is_file():
            raise ToolchainError(
                f"LLAMA_CPP_DIR={root}: has no {_CONVERTER}", "Unset it, or set it to a llama.cpp folder."
            )
        programs = [root / "build" / "bin" / "llama-quantize", root / "llama-quantize"]
        return Toolchain(root, "own", next((path for path in programs if path.is_file()), None))
    root = _pinned_root()
    return Toolchain(root, VERSION) if root.is_dir() else None


def ensure(reporter: Reporter) -> Toolchain:
    """Return the toolchain; download it the first time.

    Raises:
        ToolchainError: the library is missing, or its version differs from the converter's.
        OfflineError: the converter can't be downloaded.
    """
    toolchain = find()
    if toolchain is None or toolchain.quantizer is None:
        check_library()
    if toolchain is not None:
        return toolchain
    reporter.doing("downloading llama.cpp's converter (77 MB), once")
    target = _pinned_root()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        archive = download_package(f"llama-cpp-python=={VERSION}", _SHA256, Path(temporary), source=True)
        with replacing(target) as partial:
            _unpack(archive, partial)
    return Toolchain(target, VERSION)


def check_library() -> str:
    """Return the version of the installed library.

    Raises:
        ToolchainError: it is missing, or its version differs from the converter's.
    """
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise ToolchainError("llama-cpp-python is not installed", f"To install it, {INSTALL_LOCAL}.") from None
    if version != VERSION:
        raise ToolchainError(
            f"llama-cpp-python is version {version}, but the converter needs {VERSION}",
            f"Install the pinned version: pip install llama-cpp-python=={VERSION}",
        )
    return version


def templates_folder() -> Path:
    """Return the folder of chat templates of published models that comes with llama.cpp.

    Raises:
        ToolchainError: the toolchain has not been downloaded.
    """
    toolchain = find()
    if toolchain is None:
        raise ToolchainError("llama.cpp's converter has not been downloaded yet", "Run `kolotune doctor --fix`.")
    return toolchain.root / "models" / "templates"


def _pinned_root() -> Path:
    return cache_folder("toolchain") / f"llama.cpp-{VERSION}-{_FORMAT}"


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the files that are used; the tar filter keeps every path inside `target`."""
    prefix = PurePosixPath(f"llama_cpp_python-{VERSION}", "vendor", "llama.cpp")
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            path = PurePosixPath(member.name)
            if path.is_relative_to(prefix) and any(path.relative_to(prefix).is_relative_to(part) for part in _UNPACKED):
                member.name = path.relative_to(prefix).as_posix()
                members.append(member)
        if not members:
            raise ToolchainError(
                f"{archive.name}: contains no llama.cpp", "The pinned version is wrong; please report this."
            )
        # Python before 3.11.4 (Debian 12's) has no filters; the archive's hash has been checked.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        tar.extractall(target, members=members)
