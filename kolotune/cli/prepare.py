"""The verb `prepare`: read, check and tokenize the chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.run_folder.layout import RunFolder

from . import hints
from .options import drop_unset, reporter, resolve_flags, with_options
from .parameters import ConfigFile, Data, Json


@with_options()
def prepare(data: Data = None, config: ConfigFile = None, json: Json = False, **flags: Any) -> int:
    """Turn chats into tokens with a loss mask."""
    from kolotune.pipeline.run import run_pipeline

    folder = Path(str(drop_unset(flags).get("output_dir", DEFAULT_OUTPUT_DIR)))
    saved = RunFolder(folder).config
    resolved = resolve_flags(flags, data, config, saved if saved.is_file() else None)
    if not resolved.train_data:
        raise hints.no_chats("prepare")
    hints.require_files(resolved)
    run_pipeline(resolved, reporter(json), ["prepare"])
    return 0
