"""What every engine writes while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kolotune.foundation.files import replacing
from kolotune.run_folder.metrics import parse_line


class Metrics:
    """`metrics.jsonl`: one JSON object a line, for each step and each evaluation."""

    def __init__(self, path: Path, steps_done: int) -> None:
        """See `begin`."""
        begin(path, steps_done)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


def begin(path: Path, steps_done: int) -> None:
    """Keeps what an earlier process wrote up to step `steps_done` and drops the rest."""
    kept: list[str] = []
    if steps_done and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            found = parse_line(line)  # None: a crash cut the line off
            if found is not None and found.step <= steps_done:
                kept.append(line + "\n")
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
