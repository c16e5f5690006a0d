"""Where kolotune keeps what it fetched: unpacked base models and the toolchain."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from kolotune.foundation.errors import KolotuneError, OfflineError, ToolchainError
from kolotune.foundation.files import hash_file
from kolotune.runners import local

_OF_THE_NETWORK = "Check the network and pip's settings, then run the same command again."
# What pip's log has when it fails, in the order of what tells most; pip itself tries five times.
_CAUSES = (
    ("ResolutionError|name resolution|Name or service not known|getaddrinfo", "its name can't be resolved"),
    (r"(?:HTTP error|too many) ([45]\d\d)", "it answered {}"),
    ("[Ii]ncomplete|Connection interrupted|IncompleteRead", "the download broke off"),
    ("[Tt]imed out|TimeoutError", "it stopped answering"),
    ("Connection refused|ConnectionError|connection broken", "it can't be reached"),
    ("No matching distribution", "it has no such file for this machine"),
)


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
            raise _why(requirement, log)
        if hash_file(found[0]) != sha256:
            raise _not_the_pinned(requirement)
        return found[0].replace(into / found[0].name)


def _not_the_pinned(requirement: str) -> ToolchainError:
    return ToolchainError(
        f"{requirement}: the package index has another file than the pinned one", "Check pip's index settings."
    )


def _why(requirement: str, log: Path) -> KolotuneError:
    """Why pip could not download it, from what it said."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "DO NOT MATCH THE HASHES" in text:
        return _not_the_pinned(requirement)
    for words, cause in _CAUSES:
        if found := re.search(words, text):
            return OfflineError(f"{requirement}: the package index: {cause.format(*found.groups())}", _OF_THE_NETWORK)
    return OfflineError(f"{requirement}: could not be downloaded with pip: {local.last_lines(log)}", _OF_THE_NETWORK)
