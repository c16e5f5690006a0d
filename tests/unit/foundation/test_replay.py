"""Events of a reporter in another process, repeated here."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kolotune.foundation.reporter import JsonReporter, PlainReporter, Replay, Reporter, parse_event


def speak(say: Reporter) -> None:
    say.doing("train: training")
    with say.progress("training") as progress:
        progress.update(1, 3, loss="2.0")
        say.note("held-out loss: 1.5")
        progress.update(3, 3, loss="1.0")
    say.success("done")
    say.warning("look")
    say.table("Stages", ("stage", "state"), [("prepare", "done"), ("train", "will run")])
    say.table("Empty", ("a", "b"), [])
    say.result("42", answer=42)
    say.failure("it broke", "fix it")


def test_a_replay_prints_what_the_reporter_would(capsys: pytest.CaptureFixture[str]) -> None:
    speak(JsonReporter())
    lines = capsys.readouterr().out.splitlines()
    speak(PlainReporter())
    expected = capsys.readouterr()
    replay = Replay(PlainReporter())
    for line in lines:
        event = parse_event(line)
        assert event is not None
        replay.show(event)
    said = capsys.readouterr()
    assert said.err == expected.err
    # A table without rows has lost the names of its columns on the way.
    assert [line for line in said.out.splitlines() if line.strip()] == [
        line for line in expected.out.splitlines() if line != "  a  b"
    ]


class Bars(PlainReporter):
    """Notes when counts begin and end."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Any]:
        self.seen.append(f"open {title}")
        with super().progress(title) as progress:
            yield progress
        self.seen.append(f"close {title}")

    def note(self, text: str) -> None:
        self.seen.append(text.split()[0])


def count(title: str, done: int) -> dict[str, Any]:
    return {"event": "progress", "title": title, "done": done, "total": 9}


@pytest.mark.parametrize(
    "ending", [lambda replay: replay.close(), lambda replay: replay.show({"event": "failure", "cause": "", "hint": ""})]
)
def test_a_bar_is_open_from_the_first_count_to_the_last(ending: Callable[[Replay], None]) -> None:
    bars = Bars()
    replay = Replay(bars)
    for event in (count("a", 1), {"event": "note", "text": "between"}, count("a", 9), count("b", 1), count("c", 2)):
        replay.show(event)
    ending(replay)
    marks = [each for each in bars.seen if each.startswith(("open", "close", "between"))]
    assert marks == ["open a", "between", "close a", "open b", "close b", "open c", "close c"]


def test_control_characters_and_unknown_events(capsys: pytest.CaptureFixture[str]) -> None:
    replay = Replay(PlainReporter())
    replay.show({"event": "note", "text": "a\x1b[2Jb"})
    replay.show({"event": "later", "what": "é"})
    assert capsys.readouterr().out == '    a[2Jb\n    {"event": "later", "what": "é"}\n'


@pytest.mark.parametrize("line", ["", "text", '{"event": "x"', '{"even": 1}', '["event"]', ' {"event": "x"}'])
def test_other_lines_are_not_events(line: str) -> None:
    assert parse_event(line) is None
