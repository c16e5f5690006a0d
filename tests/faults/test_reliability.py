"""The page of the long fault suite keeps what was measured elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

from support import figures

from faults import reliability

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_what_is_not_measured_here_stays(tmp_path: Path) -> None:
    before = PAGE.read_text(encoding="utf-8")
    assert "not measured" not in before
    assert reliability.page(tmp_path, before) == before


def test_a_measured_stage_replaces_its_row(tmp_path: Path) -> None:
    before = PAGE.read_text(encoding="utf-8")
    figures.write(tmp_path / "calls.json", {"merge": {"points": 12, "killed": 12, "every": 3}})
    expected = re.sub(r"(system calls of merge \|) [^|]* ", r"\1 12, one in 3 of all; killed at 12 ", before)
    assert expected != before
    assert reliability.page(tmp_path, before) == expected


def test_an_empty_page_says_what_is_missing(tmp_path: Path) -> None:
    assert reliability.page(tmp_path).count("| not measured |") == 6
