"""What tests read from a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kolotune.foundation import config as configs
from kolotune.foundation.config import Config
from kolotune.foundation.hashing import Hasher, hash_file
from kolotune.pipeline.stages import STAGE_NAMES
from kolotune.pipeline.status import read_status
from kolotune.run_folder.layout import RunFolder
from kolotune.run_folder.metrics import read_metrics

# The stages of a run with --no-compare, as most runs of tests are, to save their time.
STAGES_WITHOUT_COMPARE = tuple(name for name in STAGE_NAMES if name != "compare")


def config_of(run: RunFolder, **changes: Any) -> Config:
    saved = configs.resolve((configs.load_file(run.config), "saved", run.root))
    kept = {name: getattr(saved, name) for name in configs.OPTIONS}
    return configs.resolve((kept, "saved", run.root), (changes, "changes", run.root.parent))


def states(run: RunFolder) -> dict[str, str]:
    return {status.name: status.state for status in read_status(run)}


def partials(run: RunFolder) -> list[Path]:
    paths = [path for path in run.root.rglob("*") if path.name.endswith((".partial", ".old"))]
    return [path for path in paths if path.parent != run.checkpoints]  # a terminated engine may leave one there


def results(root: Path) -> dict[str, str]:
    """Return the hashes of tokens, adapter, merged weights, GGUFs and Modelfiles."""
    run = RunFolder(root)
    folders = [run.prepared, run.adapter, run.merged_model]
    files = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
    files += sorted(root.glob("*.gguf")) + sorted(root.glob("Modelfile*"))
    return {run.relative(path): hash_file(path) for path in files}


def losses(metrics: Path, key: str = "loss") -> dict[int, float]:
    """Return step → loss of a metrics file; a line that a crash cut off is skipped."""
    lines = read_metrics(metrics, skip_damaged=True) if metrics.is_file() else []
    values = [(line.step, getattr(line, key)) for line in lines if getattr(line, key) is not None]
    assert len(dict(values)) == len(values), "a step is there twice"
    return dict(values)


def hashes(run: RunFolder) -> dict[str, str]:
    """Return the hashes of all results, whole folders among them."""
    hasher = Hasher()
    paths = [*run.root.glob("*.gguf"), *run.root.glob("Modelfile*"), run.adapter, run.merged_model, run.prepared]
    return {path.name: hasher.of(path) for path in paths}
