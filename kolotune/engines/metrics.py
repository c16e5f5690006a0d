"""What every engine writes while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kolotune.foundation.files import replacing


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
            try:
                if json.loads(line)["step"] <= steps_done:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line that a crash cut off
    with replacing(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")
