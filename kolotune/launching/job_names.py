"""Names of jobs, and words that neither a scheduler nor a shell can misread."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from kolotune.foundation.errors import ConfigError

# Kubernetes names a machine after the job and its number, in at most 63 characters that a DNS label may contain.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")
_WORD = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_.,:=+@/*\[\]-]*")
_MAX_SLUG_LENGTH = 30


def name_for(folder: Path) -> str:
    """Return a job name for a run folder, always the same one."""
    path = os.path.abspath(folder)
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(path).lower()).strip("-")[:_MAX_SLUG_LENGTH].strip("-") or "run"
    return f"kolotune-{slug}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:6]}"


def require_name(name: str) -> str:
    """Return `name`, if every scheduler accepts it as a job's.

    Raises:
        ConfigError: one would not.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name: {name!r} can't be a job's name",
            "Use small letters, digits and dashes, a letter first, at most 50 characters.",
        )
    return name


def require_word(option: str, value: str) -> str:
    """Return `value`, if it is a word that can't be an option and means nothing special to a shell.

    Raises:
        ConfigError: it is not.
    """
    if not _WORD.fullmatch(value):
        raise ConfigError(
            f"{option}: {value!r} contains characters that are not allowed", "Use letters, digits and _.,:=+@/*-"
        )
    return value
