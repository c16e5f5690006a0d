"""What tests ask of a run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from kolotune import config as configs
from kolotune import pipeline
from kolotune.config import Config
from kolotune.layout import RunFolder

# The stages of a run with --no-compare, as most runs of tests are, to save their time.
ROAD = tuple(name for name in pipeline.NAMES if name != "compare")


def config_of(run: RunFolder, **changes: Any) -> Config:
    saved = configs.resolve((configs.load_file(run.config), "saved", run.root))
    return configs.resolve((dataclasses.asdict(saved), "saved", run.root), (changes, "changes", run.root.parent))


def states(run: RunFolder) -> dict[str, str]:
    return {each.name: each.state for each in pipeline.status(run)}


def partials(run: RunFolder) -> list[Path]:
    found = [path for path in run.root.rglob("*") if path.name.endswith((".partial", ".old"))]
    return [path for path in found if path.parent != run.checkpoints]  # a terminated engine may leave one there
