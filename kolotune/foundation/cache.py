"""The user's cache folders: everything in them can be downloaded or made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Return the cache folder for `kind`; the variable KOLOTUNE_CACHE moves all of them."""
    import platformdirs

    root = os.environ.get("KOLOTUNE_CACHE") or platformdirs.user_cache_dir("kolotune", appauthor=False)
    return Path(root) / kind
