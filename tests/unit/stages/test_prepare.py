"""Chats that are left out are counted, and their locations reported."""

from __future__ import annotations

import datetime
from collections import Counter
from typing import Any

import pytest
from support.small_tokenizer import THINKING

from kolotune.chats.dataset.prepared import AffectedChats, Prepared
from kolotune.chats.templates.template import ChatTemplate
from kolotune.chats.templates.template_binding import bind
from kolotune.foundation.reporter import PlainReporter
from kolotune.stages import prepare


def test_locations_of_left_out_chats_are_reported(reporter: PlainReporter, capsys: pytest.CaptureFixture[str]) -> None:
    nothing: Any = None
    prepared = Prepared(ChatTemplate("{{ messages }}", {}), nothing, "")
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


@pytest.mark.parametrize(
    ("counts", "words"),
    [({True: 3, False: 2}, ()), ({True: 3}, ("off", "without reasoning")), ({False: 2}, ("on", "with reasoning"))],
)
def test_a_side_of_a_switch_that_is_not_trained_is_reported(
    counts: dict[bool, int], words: tuple[str, ...], reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing: Any = None
    jinja = bind(THINKING, datetime.date(2026, 3, 5), {}, ("enable_thinking",))
    prepared = Prepared(ChatTemplate(jinja, {}), nothing, jinja, thinking=Counter(counts))
    prepare.report_prepared(prepared, reporter)
    printed = capsys.readouterr().out
    assert f"on for {counts.get(True, 0)} answers with reasoning, off for {counts.get(False, 0)}" in printed
    assert ("--template-switch" in printed) == bool(words) and all(word in printed for word in words)
    facts = prepared.summary()
    assert facts["answers_with_thoughts"] == counts.get(True, 0)


@pytest.mark.parametrize("has_preferences", [False, True])
def test_what_preferences_refuse_is_not_advised(
    has_preferences: bool, reporter: PlainReporter, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing: Any = None
    prepared = Prepared(ChatTemplate("{{ messages }}", {}), nothing, "", dropped_thoughts=2)
    prepared.has_preferences, prepared.unread = has_preferences, Counter(label=1)
    prepare.report_prepared(prepared, reporter)
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 thoughts are left out of later prompts" in printed
    assert ("--split-thoughts" in printed) == (not has_preferences)
    assert ("--objective dpo or kto" in printed) == (not has_preferences)
