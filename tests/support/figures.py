"""Figures that `make faults` and `make fuzz` keep between calls."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path:
    """Return the folder in KOLOTUNE_TEST_CACHE or the user's cache; create it if it is missing."""
    root = os.environ.get("KOLOTUNE_TEST_CACHE") or Path("~/.cache/kolotune-tests").expanduser()
    path = Path(root, "faults")
    path.mkdir(parents=True, exist_ok=True)
    return path


def read(file: Path) -> dict[str, Any]:
    """Return the figures in a file; none when there is no file."""
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return figures


def write(file: Path, figures: dict[str, Any]) -> None:
    """Write figures; the file holds the old or the new ones, never parts."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    partial.replace(file)
