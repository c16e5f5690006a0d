"""Names and paths that the image, the container and the client agree on."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath

from kolotune.version import VERSION

DEFAULT_NAME = "kolo_container"
VERSION_LABEL = "kolotune.version"
VOLUME = PurePosixPath("/runs")
INPUTS = VOLUME / ".inputs"
"""Input files that were sent in, each in a folder of its own (`input_name`)."""
MISSING = INPUTS / "missing"
"""Stands for a file that does not exist on the host either, so that the verb itself reports it."""
OUTSIDE = VOLUME / ".out"
"""Folders that a verb makes outside a run folder, until they are copied to the host."""
HOME = "/home/kolotune"
"""Working directory of commands: empty, so that no name means a file by accident."""
USER = 1000
"""Number of the image's user and group, which own the files that are sent in."""
PYTHON = "/opt/kolotune/venv/bin/python"

_MAX_NAME_LENGTH = 40


def image_tag() -> str:
    """Return the tag of the image for this version of kolotune."""
    return f"kolotune:{VERSION}"


def volume_of(name: str) -> str:
    """Return the name of the volume that belongs to the container `name`."""
    return f"{name}_runs"


def input_name(name: str, content: str) -> str:
    """Return the folder name for a file with this name and content hash. The same content under two names is two."""
    return hashlib.sha256(f"{content} {name}".encode()).hexdigest()[:32]


def run_folder(host: Path) -> PurePosixPath:
    """Return the folder on the volume that belongs to a run folder of the host, always the same one."""
    path = os.path.abspath(host)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(path)).lstrip(".-")[:_MAX_NAME_LENGTH] or "run"
    return VOLUME / f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:10]}"
