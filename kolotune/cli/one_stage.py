"""Run one stage of a run folder: what the verbs that are named as stages share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from kolotune.foundation.config import Kind, option_names
from kolotune.foundation.errors import ConfigError, RunFolderError
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.retention import stages_skipped_by_lean

from . import hints
from .options import drop_unset, reporter, resolve_flags


def run_one_stage(name: str, root: Path, json: bool, flags: Mapping[str, object]) -> int:
    """Run the stage `name`, whether or not anything changed; return the exit code.

    Raises:
        ConfigError: a lean run does not keep what the stage makes.
        RunFolderError: `root` is no run folder, or an earlier stage is not done.
    """
    from kolotune.pipeline.run import run_pipeline
    from kolotune.pipeline.status import read_status
    from kolotune.run_folder.source import read_source

    folder = RunFolder(root.absolute()).require()
    resolved = resolve_flags(flags, saved=folder.config)
    if name in stages_skipped_by_lean(resolved):
        raise ConfigError(
            f"{name}: this run is lean and does not keep the output of {name}",
            f"To make it anyway: {hints.command(name, folder.root, '--no-lean')}",
        )
    for stage in read_status(folder, resolved):
        if stage.name == name:
            break
        if stage.has_work:
            raise RunFolderError(
                f"{folder.root}: {name} needs {stage.name}, which is not done ({'; '.join(stage.explanations())})",
                f"Run `{_command(stage.name, folder.root, flags)}` first, or `kolotune run` for all stages.",
            )
    resolved = dataclasses.replace(resolved, output_dir=folder.root)
    run_pipeline(resolved, reporter(json), [name], read_source(folder), restore=[name])
    return 0


def _command(stage: str, root: Path, flags: Mapping[str, object]) -> str:
    """Return the command that runs a stage of a run folder; prepare is given data, and what was to be otherwise."""
    if stage != "prepare":
        return hints.command(stage, root)
    shared = [*option_names(stage=stage), *option_names(kind=Kind.BASE_MODEL)]
    words: list[str | Path] = [stage, "--output-dir", root]
    for name, value in drop_unset(flags).items():
        flag = name.replace("_", "-")
        if name not in shared:
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [
                word for each in (value if isinstance(value, list) else [value]) for word in (f"--{flag}", str(each))
            ]
    return hints.command(*words)
