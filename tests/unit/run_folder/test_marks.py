"""Marks of stages that are not done."""

from __future__ import annotations

import pytest

from kolotune.run_folder.marks import MarkState, read_mark, remove_mark, write_mark
from kolotune.run_folder.stage import Context


def test_marks_come_and_go(context: Context) -> None:
    assert read_mark(context.run, "fake") is None
    write_mark(context.run, "fake", MarkState.FAILED, "the cause")
    mark = read_mark(context.run, "fake")
    assert mark is not None and (mark.state, mark.cause) == (MarkState.FAILED, "the cause")
    remove_mark(context.run, "fake")
    remove_mark(context.run, "fake")
    assert read_mark(context.run, "fake") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '{"state": 5}', '{"state": "odd"}'])
def test_a_damaged_mark_is_ignored(context: Context, text: str) -> None:
    (context.run.state / "fake.unfinished.json").write_text(text)
    assert read_mark(context.run, "fake") is None
