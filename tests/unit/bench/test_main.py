"""`python bench`: results go to the results folder, and the page that is kept by hand stays."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from measuring import ROOT, Result


@pytest.fixture
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("all_measurements", ROOT / "bench" / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_kept_page_is_not_replaced(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def run(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "--json" not in argv:  # a result asks git for the commit
            return real(argv, **options)
        result = Result("growth", "Growth of a training")
        result.at_most("memory", 1.0, 2.0, " MB")
        result.finish(Path(argv[argv.index("--json") + 1]))
        return subprocess.CompletedProcess(argv, 0)

    kept = ROOT / "bench" / "RESULTS.md"
    before = kept.read_bytes()
    monkeypatch.setattr(bench.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench", "--only", "growth", "--results", str(tmp_path / "results")])
    assert bench.main() == 0
    text = (tmp_path / "results" / "RESULTS.md").read_text(encoding="utf-8")
    assert "## Growth of a training" in text and "1 of 1 targets are met." in text
    assert kept.read_bytes() == before
