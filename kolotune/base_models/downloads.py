"""Download files from the Python package index with pip; each has a pinned hash."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

from kolotune.foundation.errors import KolotuneError, OfflineError, ToolchainError
from kolotune.foundation.hashing import hash_file
from kolotune.runners import local

_NETWORK_HINT = "Check the network and pip's settings, then run the same command again."
# Patterns in pip's log and their causes, the most specific first; pip itself tries five times.
_CAUSES = (
    ("ResolutionError|name resolution|Name or service not known|getaddrinfo", "its name can't be resolved"),
    (r"(?:HTTP error|too many) ([45]\d\d)", "it answered {}"),
    ("[Ii]ncomplete|Connection interrupted|IncompleteRead", "the download was interrupted"),
    ("[Tt]imed out|TimeoutError", "it stopped answering"),
    ("Connection refused|ConnectionError|connection broken", "it can't be reached"),
    ("No matching distribution", "it has no such file for this machine"),
)


def download_package(requirement: str, sha256: str, folder: Path, *, source: bool = False) -> Path:
    """Download one file and check its hash.

    Args:
        requirement: ``name==version``.
        sha256: hex digest of the file; pip refuses any other.
        folder: an existing folder to download to.
        source: download the source archive instead of a wheel.

    Returns:
        The downloaded file.

    Raises:
        OfflineError: pip could not download it.
        ToolchainError: its hash differs.
    """
    log = folder / "pip.log"
    requirements = folder / "requirement.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
    # pip builds the metadata of a source archive with tools that it must not have to build from source as well.
    kind = ["--no-binary", requirement.partition("==")[0]] if source else ["--only-binary", ":all:"]
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", *kind]
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        code = local.run([*argv, "--dest", temporary, "--requirement", str(requirements)], log=log)
        files = sorted(Path(temporary).iterdir())
        if code != 0 or len(files) != 1:
            raise _download_error(requirement, log)
        if hash_file(files[0]) != sha256:
            raise _hash_error(requirement)
        return files[0].replace(folder / files[0].name)


def _hash_error(requirement: str) -> ToolchainError:
    return ToolchainError(
        f"{requirement}: the package index has another file than the pinned one", "Check pip's index settings."
    )


def _download_error(requirement: str, log: Path) -> KolotuneError:
    """Return the error that pip's log explains."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "DO NOT MATCH THE HASHES" in text:
        return _hash_error(requirement)
    for pattern, cause in _CAUSES:
        if match := re.search(pattern, text):
            return OfflineError(f"{requirement}: the package index: {cause.format(*match.groups())}", _NETWORK_HINT)
    return OfflineError(f"{requirement}: pip could not download it: {local.last_lines(log)}", _NETWORK_HINT)
