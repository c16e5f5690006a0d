"""The verb `run`: all stages, from chats to a model for Ollama."""

from __future__ import annotations

from typing import Any

from kolotune.run_folder.layout import RunFolder

from . import hints
from .comparison_table import show_when_done
from .options import drop_unset, reporter, resolve_flags, with_options
from .parameters import ConfigFile, Data, Json
from .report import reporting
from .settings import Verbose, show_settings


@with_options()
def run(
    data: Data = None, config: ConfigFile = None, verbose: Verbose = False, json: Json = False, **flags: Any
) -> int:
    """Run all stages that have work, from chats to a model."""
    from kolotune.pipeline.choices import choose
    from kolotune.pipeline.run import run_pipeline

    say = reporter(json)
    resolved = resolve_flags(flags, data, config)
    if not resolved.train_data:
        raise hints.no_chats("run")
    hints.require_files(resolved)
    folder = RunFolder(resolved.output_dir)
    before_training = choose(resolved, folder, [])[0]  # whether the step can be compiled takes compiling to find out
    show_settings(before_training, say, drop_unset(flags), verbose=verbose or json)
    with show_when_done(folder, say, enabled=resolved.compare), reporting(folder, say):
        run_pipeline(resolved, say)
    say.success(f"Done: {folder.root}")
    say.note(f"Chat with it:        {hints.command('chat', folder.root)}")
    say.note(f"Put it into Ollama:  {hints.command('install', folder.root, 'my-model')}")
    return 0
