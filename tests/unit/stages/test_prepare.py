"""Chats that are left out are counted, and their locations reported."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.chats.dataset.prepared import AffectedChats, Prepared
from kolotune.foundation.reporter import PlainReporter
from kolotune.stages import prepare


def test_locations_of_left_out_chats_are_reported(reporter: PlainReporter, capsys: pytest.CaptureFixture[str]) -> None:
    nothing: Any = None
    prepared = Prepared(nothing, nothing, "")
    prepared.duplicates = AffectedChats(1, ("a.jsonl:9 is a.jsonl:2 again",))
    prepared.in_both = AffectedChats(1, ("held.jsonl:4",))
    prepared.shortened = AffectedChats(1, ("a.jsonl:5: 2 turns",))
    prepared.too_long = AffectedChats(25, tuple(f"a.jsonl:{line}" for line in range(100, 120)))
    prepare.report_prepared(prepared, reporter)
    printed = capsys.readouterr().out
    for location in (
        "a.jsonl:9 is a.jsonl:2 again",
        "held.jsonl:4",
        "a.jsonl:5: 2 turns",
        "a.jsonl:100",
        "a.jsonl:119",
    ):
        assert location in printed
    assert "a.jsonl:120" not in printed and "and 5 more" in printed
