"""The verb `prepare`: read, check and tokenize the chats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kolotune.foundation.config import DEFAULT_OUTPUT_DIR
from kolotune.run_folder.layout import RunFolder

from . import hints
from .options import ConfigFile, Data, Json, config_of, given, reporter, with_options


@with_options("data", "model", "export", leave_out=("quantization", "system", "parameter", "merge_dtype", "lean"))
def prepare(data: Data = None, config: ConfigFile = None, json: Json = False, **flags: Any) -> int:
    """Turn chats into tokens with a loss mask."""
    from kolotune.pipeline.run import run_pipeline

    folder = Path(given(flags).get("output_dir", DEFAULT_OUTPUT_DIR))
    saved = RunFolder(folder).config
    resolved = config_of(flags, data, config, saved if saved.is_file() else None)
    if not resolved.train_data:
        raise hints.no_chats("prepare")
    hints.require_files((*resolved.train_data, *resolved.eval_data))
    run_pipeline(resolved, reporter(json), ["prepare"])
    return 0
