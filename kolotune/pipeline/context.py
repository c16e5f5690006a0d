"""The context of a run that exists already."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from kolotune.base_models.new_tokens import locate_base
from kolotune.foundation.config import Config
from kolotune.foundation.hashing import Hasher
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.results import saved_config
from kolotune.run_folder.source import read_source
from kolotune.run_folder.stage import Context


def open_context(folder: RunFolder, config: Config | None = None, *, hash_cache: Path | None = None) -> Context:
    """Return the context of a run; nothing is fetched.

    Args:
        folder: the run folder.
        config: options in place of those that the run was made with.
        hash_cache: hashes of earlier processes to trust; see `Hasher`.

    Raises:
        RunFolderError: it is not a run folder.
        ConfigError: its saved config can't be read.
    """
    saved = saved_config(folder)
    config = dataclasses.replace(config or saved, output_dir=folder.root)
    base = locate_base(config) or folder.root / "base model is not on this machine"
    return Context(config, folder, base, read_source(folder), Hasher(hash_cache))
