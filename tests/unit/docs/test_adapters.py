"""The page about adapters made elsewhere names every method of PEFT, and each of its rows a test that exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from kolotune.weights.adapter_kinds import METHODS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| adapter |")
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_the_test_behind_each_row_exists(row: list[str]) -> None:
    assert len(row) == 3 and all(row)
    file, _, name = row[2].strip("`").partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


def test_every_method_that_is_refused_is_on_the_page() -> None:
    words = " ".join(PAGE.split())
    assert len(ROWS) > 20
    assert not [method.name for method in METHODS.values() if method.name not in words]
