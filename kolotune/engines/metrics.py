"""The writer of `metrics.jsonl`; `run_folder.metrics` reads it."""

from __future__ import annotations

import json
from pathlib import Path

from kolotune.foundation.files import replacing
from kolotune.run_folder.metrics import parse_line


class MetricsWriter:
    """Appends JSON lines, one for each step and each evaluation.

    Args:
        path: the file.
        steps_done: steps up to which earlier lines are kept; see `keep_metrics`.
    """

    def __init__(self, path: Path, steps_done: int) -> None:
        keep_metrics(path, steps_done)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **fields: float) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def keep_metrics(path: Path, steps_done: int) -> None:
    """Keep the lines that an earlier process wrote up to step `steps_done`, and drop the others and damaged ones."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if steps_done and path.is_file() else []
    kept = [text + "\n" for text in lines if (line := parse_line(text)) is not None and line.step <= steps_done]
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
