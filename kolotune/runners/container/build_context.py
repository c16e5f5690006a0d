"""The build context of the image: one tar of the Dockerfile and all files that it copies.

The source is the installed package, so that a client installed with pip can build too. Names, order and modes depend
on nothing else, so that Docker takes unchanged parts from its cache of layers.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from kolotune.foundation.engine_registry import ENGINES
from kolotune.foundation.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[2]
_IMAGE = Path(__file__).with_name("image")
_LOCK = "requirements.lock"
# Modules that fetch llama.cpp's converter or make an engine's environment: separate build steps, which Docker does not
# repeat when other files change.
_DOWNLOADING = (
    "__init__.py",
    "base_models/__init__.py",
    "base_models/downloads.py",
    "foundation/__init__.py",
    "foundation/cache.py",
    "foundation/errors.py",
    "foundation/files.py",
    "foundation/formatting.py",
    "foundation/hashing.py",
    "foundation/installation.py",
    "foundation/locks.py",
    "foundation/typed_storage.py",
    "foundation/secrets.py",
    "foundation/waiting_threads.py",
    "runners/__init__.py",
    "runners/local.py",
    "runners/signals.py",
    "runners/watchdog.py",
    "version.py",
)
_STEPS = {
    "toolchain": (
        *_DOWNLOADING,
        "foundation/formatting.py",
        "foundation/hardware.py",
        "foundation/reporter",
        "foundation/shared_libraries.py",
        "llamacpp/__init__.py",
        "llamacpp/toolchain.py",
    ),
    **{name: (*_DOWNLOADING, *entry.image_files) for name, entry in ENGINES.items() if entry.image_files},
}


def write(
    output: IO[bytes], *, wheels: Path | None = None, ca_bundle: Path | None = None, pip_config: Path | None = None
) -> None:
    """Write the build context as a tar.

    Args:
        output: an open file.
        wheels: a folder of wheels that pip prefers.
        ca_bundle: certificates in PEM that pip trusts during the build; for machines behind a proxy.
        pip_config: pip's settings during the build. Neither of the two is in the image.

    Raises:
        ConfigError: a file does not exist, or the folder contains no wheel.
    """
    with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "Dockerfile", _IMAGE / "Dockerfile")
        _add(tar, f"build/{_LOCK}", _IMAGE / _LOCK)
        for name, path in (("ca.pem", ca_bundle), ("pip.conf", pip_config)):
            if path is not None:
                if not path.is_file():
                    raise ConfigError(f"{path}: there is no such file", "See `kolotune container build --help`.")
                _add(tar, f"build/{name}", path)
        _add_folder(tar, "build/wheels")
        for wheel in _wheels(wheels):
            _add(tar, f"build/wheels/{wheel.name}", wheel)
        for step, names in _STEPS.items():
            for path in (file for name in names for file in _package_files(_PACKAGE / name)):
                _add(tar, f"{step}/kolotune/{path.relative_to(_PACKAGE).as_posix()}", path)
        for path in _package_files():
            _add(tar, f"kolotune/{path.relative_to(_PACKAGE).as_posix()}", path)


def _wheels(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise ConfigError(f"{folder}: contains no wheels", "Fill it with `pip wheel` or `pip download`.")
    return wheels


def _package_files(root: Path = _PACKAGE) -> Iterator[Path]:
    for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    with path.open("rb") as handle:
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = path.stat().st_size, 0o644
        tar.addfile(entry, handle)


def _add_folder(tar: tarfile.TarFile, name: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(entry, io.BytesIO())
