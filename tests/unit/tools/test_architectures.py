"""The table of architectures: eight rows, and all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "docs" / "architectures.md"
EIGHT = {
    "llama": "tuned and equal",
    "qwen2": "tuned and equal",
    "gemma2": "tuned and equal",
    "phi3": "tuned and equal",
    "gpt_neox": "tuned and equal",
    "mamba": "tuned and equal",
    "mistral": "trained with a warning",
    "bamba": "refused before preparing",
}


def rows_of(*names: str) -> list[dict[str, Any]]:
    """Run the script for some types of models, or for all."""
    argv = [sys.executable, str(ROOT / "tools" / "architectures.py"), *names]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def table() -> dict[str, str]:
    """Return the verdicts of the table in the docs, by type of model."""
    lines = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {cells[1]: cells[2] for cells in lines[1:]}


def test_eight_rows() -> None:
    rows = rows_of(*EIGHT)
    assert {row["model_type"]: row["outcome"] for row in rows} == EIGHT
    for row in rows:
        assert (row["outcome"] == "tuned and equal") == (row["reason"] == "")
        if row["outcome"] == "tuned and equal":
            assert row["divergence"] < 1e-6 and row["reached"] > 0
    assert {name: table()[name] for name in EIGHT} == EIGHT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_every_row_is_as_the_docs_say(part: int) -> None:
    documented = table()
    names = sorted(documented)[part::4]
    rows = {row["model_type"]: row["outcome"] for row in rows_of(*names)}
    assert rows == {name: documented[name] for name in names}


def test_no_row_failed() -> None:
    outcomes = list(table().values())
    assert outcomes.count("tuned and equal") >= 70
    assert set(outcomes) == {"tuned and equal", "refused before preparing", "trained with a warning", "not possible"}
