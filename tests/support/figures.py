"""Where the programs of `make faults` and `make fuzz` keep what they measured, between calls."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path:
    """In KOLOTUNE_TEST_CACHE or the user's cache; made if it is not there."""
    root = os.environ.get("KOLOTUNE_TEST_CACHE") or Path("~/.cache/kolotune-tests").expanduser()
    found = Path(root, "faults")
    found.mkdir(parents=True, exist_ok=True)
    return found


def read(file: Path) -> dict[str, Any]:
    """What stands in a file of figures; nothing where there is none."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def write(file: Path, figures: dict[str, Any]) -> None:
    """Keeps figures: the old ones or the new ones, whole."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
