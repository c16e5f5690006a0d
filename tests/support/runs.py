"""What tests ask of a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.files import hash_file
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.pipeline.status import read_status
from kolotune.run_folder.layout import RunFolder

# The stages of a run with --no-compare, as most runs of tests are, to save their time.
STAGES_WITHOUT_COMPARE = tuple(name for name in STAGE_NAMES if name != "compare")


def config_of(run: RunFolder, **changes: Any) -> Config:
    saved = configs.resolve((configs.load_file(run.config), "saved", run.root))
    return configs.resolve((dataclasses.asdict(saved), "saved", run.root), (changes, "changes", run.root.parent))


def states(run: RunFolder) -> dict[str, str]:
    return {each.name: each.state for each in read_status(run)}


def partials(run: RunFolder) -> list[Path]:
    found = [path for path in run.root.rglob("*") if path.name.endswith((".partial", ".old"))]
    return [path for path in found if path.parent != run.checkpoints]  # a terminated engine may leave one there


def results(root: Path) -> dict[str, str]:
    """The hashes of what a run is for: tokens, adapter, merged weights, GGUFs, Modelfiles."""
    run = RunFolder(root)
    folders = [run.prepared, run.adapter, run.merged_model]
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    files += sorted(root.glob("*.gguf")) + sorted(root.glob("Modelfile*"))
    return {run.relative(path): hash_file(path) for path in files}


def losses(metrics: Path, key: str = "loss") -> dict[int, float]:
    """Step → loss, of a metrics file; a line that a crash cut off is passed over."""
    found: list[tuple[int, float]] = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines() if metrics.is_file() else ():
        with contextlib.suppress(ValueError):
            each = json.loads(line)
            if key in each:
                found.append((each["step"], each[key]))
    assert len(dict(found)) == len(found), "a step stands there twice"
    return dict(found)
