"""What is printed: plain, JSON and rich, and nothing in it can steer a terminal."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kolotune import reporter
from kolotune.reporter import JsonReporter, PlainReporter, RichReporter, clean, make_reporter, size_in_words

HOSTILE = [
    "\x1b[2J\x1b[H",
    "\x1b]0;owned\x07",
    "\x1b]8;;http://evil\x1b\\",
    "\x9b31m",
    "\r overwritten",
    "\b\b\b",
    "\x07",
    "\u202e reversed",
    "\u2066\u2069",
    "\u200b",
    "\x00",
    "\x85next",
    "\u2028line",
    "\udcff",
    "\ufeff",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_steering_characters_are_stripped(text: str) -> None:
    left = clean(f"before{text}after")
    assert left.startswith("before")
    assert left.endswith("after")
    for char in "\x1b\x9b\r\b\x07\u202e\u2066\u200b\x00\x85\u2028\udcff\ufeff":
        assert char not in left


@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_what_is_left_is_printable_and_order_is_kept(text: str) -> None:
    left = clean(text)
    assert clean(left) == left
    left.encode("utf-8")
    assert all(char.isprintable() or char.isspace() or ord(char) > 127 for char in left)
    assert not set(left) & (set(map(chr, [*range(32), 127, *range(128, 160)])) - {"\n", "\t"})


def test_ordinary_text_of_any_language_stays() -> None:
    text = "naïve 日本語 العربية 🙂 \t⟦x⟧\n"
    assert clean(text) == text


def speak(say: Any, text: str) -> None:
    say.doing(text)
    say.success(text)
    say.note(text)
    say.warning(text)
    say.table(text, (text, "b"), [(text, text)])
    say.result(text, extra=1)
    say.failure(text, text)
    with say.progress("count") as progress:
        progress.update(1, 2, loss="0.5")
        progress.update(2, 2, loss="0.4")


@pytest.mark.parametrize("text", HOSTILE)
def test_no_reporter_lets_a_steering_character_out(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for say in (PlainReporter(), JsonReporter()):
        speak(say, f"a{text}b")
        captured = capsys.readouterr()
        for char in "\x1b\x9b\r\b\x07\u202e\x00\x85\u2028\udcff":
            assert char not in captured.out + captured.err


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    speak(PlainReporter(), "x")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "... x",
        "ok  x",
        "    x",
        "warning: x",
        "x",
        "  x  b",
        "  x  x",
        "x",
        "    count 1/2 loss 0.5",
        "    count 2/2 loss 0.4",
    ]
    assert captured.err == "error: x\n       x\n"


def test_plain_progress_is_not_a_flood_but_tells_the_first_and_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainReporter().progress("count") as progress:
        for done in range(1, 101):
            progress.update(done, 100)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/100", "100/100"]


def test_every_line_of_json_is_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    speak(JsonReporter(), "two\nlines \x1b[2J é")
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    assert captured.err == ""
    assert [each["event"] for each in events] == [
        "doing",
        "success",
        "note",
        "warning",
        "table",
        "result",
        "failure",
        "progress",
        "progress",
    ]
    assert events[0]["text"] == "two\nlines \x1b[2J é"
    assert events[6] == {"event": "failure", "cause": events[0]["text"], "hint": events[0]["text"]}
    assert events[8] == {"event": "progress", "title": "count", "done": 2, "total": 2, "loss": "0.4"}


@pytest.fixture
def rich_output(monkeypatch: pytest.MonkeyPatch) -> tuple[RichReporter, io.StringIO]:
    from rich.console import Console

    say, out = RichReporter(), io.StringIO()
    for name in ("_out", "_err"):
        monkeypatch.setattr(say, name, Console(file=out, highlight=False, width=200, no_color=True))
    return say, out


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/]", "[/red]", "runs[1]/out", "[link=http://evil]x[/link]"])
def test_rich_takes_brackets_for_brackets(rich_output: tuple[RichReporter, io.StringIO], text: str) -> None:
    say, out = rich_output
    speak(say, text)
    # doing, success, note, warning, title, column, two cells, result, cause, hint
    assert out.getvalue().count(text) >= 11


def test_rich_strips_escapes_everywhere(rich_output: tuple[RichReporter, io.StringIO]) -> None:
    say, out = rich_output
    say.table("t\x1b[2J", ("a",), [("b\x1b]0;owned\x07",)])
    say.failure("c\x1b[2J", "d\x1b[2J")
    say.result("e\x1b[2J\u202e")
    assert not set(out.getvalue()) & {"\x1b", "\x07", "\u202e"}


def test_json_is_chosen_by_its_flag_and_plain_without_a_terminal() -> None:
    assert isinstance(make_reporter(as_json=True), JsonReporter)
    assert isinstance(make_reporter(), PlainReporter)


def test_rich_is_chosen_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter.sys, "stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert isinstance(make_reporter(), RichReporter)


def test_sizes_as_people_read_them() -> None:
    assert [size_in_words(each) for each in (0, 999, 1000, 1.5e6, 2.34e9, 5e12)] == [
        "0 B",
        "999 B",
        "1 KB",
        "1.5 MB",
        "2.3 GB",
        "5.0 TB",
    ]
