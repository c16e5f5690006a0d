"""Where kolotune keeps what it fetched: unpacked base models and the toolchain."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from .errors import OfflineError, ToolchainError
from .files import hash_file
from .runners import local


def cache_folder(kind: str) -> Path:
    """The user's cache folder for `kind`; KOLOTUNE_CACHE moves all of them."""
    import platformdirs

    root = os.environ.get("KOLOTUNE_CACHE") or platformdirs.user_cache_dir("kolotune", appauthor=False)
    return Path(root) / kind


def fetch_package(requirement: str, sha256: str, into: Path, *, source: bool = False) -> Path:
    """Downloads one file from the Python package index with pip, and checks its hash.

    Args:
        requirement: ``name==version``.
        sha256: the hex digest that the file must have; pip refuses any other.
        into: an existing folder.
        source: fetch the source archive and not a wheel.

    Returns:
        The downloaded file.

    Raises:
        OfflineError: pip could not download it.
        ToolchainError: its hash is another.
    """
    log = into / "pip.log"
    wanted = into / "requirement.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    # Of a source archive pip builds the metadata, with tools that it must not have to build from source too.
    form = ["--no-binary", requirement.partition("==")[0]] if source else ["--only-binary", ":all:"]
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *form]
    with tempfile.TemporaryDirectory(dir=into) as folder:
        code = local.run([*argv, "--dest", folder, "--requirement", str(wanted)], log=log)
        found = sorted(Path(folder).iterdir())
        if code != 0 or len(found) != 1:
            raise OfflineError(
                f"{requirement}: could not be downloaded with pip: {local.last_lines(log)}",
                "Check the network and pip's settings, then run the same command again.",
            )
        if hash_file(found[0]) != sha256:
            raise ToolchainError(f"{requirement}: the download is not the pinned file", "Check pip's index settings.")
        return found[0].replace(into / found[0].name)
