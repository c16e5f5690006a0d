"""Names that the image, the container and the client agree on."""

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
"""Files sent in, each in a folder of its own (`input_name`)."""
MISSING = INPUTS / "missing"
"""Stands for what is not there on the host either, so that the verb itself says so, in its own words."""
OUTSIDE = VOLUME / ".out"
"""Folders that a verb makes outside a run folder, until they are brought out."""
HOME = "/home/kolotune"
"""Where commands start: empty, so that no name means a file by accident."""
USER = 1000
"""Number of the image's user and group; what is sent in belongs to it."""
PYTHON = "/opt/kolotune/venv/bin/python"

_LONGEST_NAME = 40


def image_tag() -> str:
    """The image of this version of kolotune."""
    return f"kolotune:{VERSION}"


def volume_of(name: str) -> str:
    """The name of the volume that belongs to the container `name`."""
    return f"{name}_runs"


def input_name(name: str, content: str) -> str:
    """What the folder of a file of that name and hash of content is called; the same content twice is two files."""
    return hashlib.sha256(f"{content} {name}".encode()).hexdigest()[:32]


def run_folder(host: Path) -> PurePosixPath:
    """The folder on the volume that belongs to a run folder of the host, the same each time."""
    path = os.path.abspath(host)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", os.path.basename(path)).lstrip(".-")[:_LONGEST_NAME] or "run"
    return VOLUME / f"{readable}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:10]}"
