"""Engines are looked up by name, and only the registry compares names of engines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kolotune
from kolotune.engines.engine import get_engine
from kolotune.foundation.engine_registry import ENGINES

PACKAGE = Path(kolotune.__file__).parent


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_found_by_its_name(name: str) -> None:
    engine = get_engine(name)
    assert engine.name == name and engine.module == f"kolotune.engines.{name}"
    assert (PACKAGE / "engines" / name / "__main__.py").is_file()


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(KeyError):
        get_engine("events")


def test_only_the_registry_compares_names_of_engines() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
                names = [part.value for part in parts if isinstance(part, ast.Constant)]
                assert not set(names) & set(ENGINES), f"{path}:{node.lineno}"
