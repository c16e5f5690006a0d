"""Each row of the table that leads from the old scripts to kolotune names a test that exists, and every row has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "docs" / "from-powershell.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| script")
]
PARAMETERS = (
    "Epochs LearningRate TrainData BaseModel LoraRank LoraAlpha LoraDropout MaxSeqLength WarmupSteps Seed "
    "SchedulerType BatchSize OutputDir Quantization WeightDecay UseCheckpoint HfToken"
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_the_test_behind_each_row_exists(row: list[str]) -> None:
    assert len(row) == 3 and all(row)
    file, _, name = row[2].partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


def test_every_parameter_of_the_script_has_a_row_and_a_flag() -> None:
    from kolotune.foundation.config import OPTIONS

    documented = " ".join(row[0] for row in ROWS)
    for name in PARAMETERS.split():
        assert f"`-{name}`" in documented
        assert re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() in OPTIONS
