"""What is printed: plain, JSON and rich, and nothing in it can steer a terminal."""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kolotune.foundation.reporter import JsonReporter, PlainReporter, RichReporter, clean, make_reporter

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
        "    count 1/2, 50%, loss 0.5",
        "    count 2/2, 100%, loss 0.4",
    ]
    assert captured.err == "error: x\n       x\n"


def test_a_plain_table_wraps_long_texts_and_keeps_paths_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"/runs/{'x' * 150}"
    PlainReporter().table("Settings", ("option", "value"), [("system", "word " * 60), ("output-dir", path), ("a", "")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Settings", "  option      value"] and lines[-1] == "  a"
    assert f"  output-dir  {path}" in lines
    assert " ".join(lines).count("word") == 60 and len(lines) > 5
    PlainReporter().table("Empty", ("a", "b"), [])
    assert capsys.readouterr().out.splitlines() == ["Empty", "  a  b"]


def test_plain_progress_prints_the_first_and_the_last_of_fast_updates(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainReporter().progress("count") as progress:
        for done in range(1, 101):
            progress.update(done, 100)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["1/100,", "100/100,"]


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
    text = events[0]["text"]
    assert {**events[6], "time": ""} == {"event": "failure", "time": "", "cause": text, "hint": text, "exit_code": 1}
    last = {**events[8], "time": ""}
    assert last == {"event": "progress", "time": "", "title": "count", "done": 2, "total": 2, "loss": "0.4"}


@pytest.fixture
def rich_output(monkeypatch: pytest.MonkeyPatch) -> tuple[RichReporter, io.StringIO]:
    from rich.console import Console

    say, out = RichReporter(), io.StringIO()
    for name in ("_out", "_err"):
        monkeypatch.setattr(say, name, Console(file=out, highlight=False, width=200, no_color=True))
    return say, out


@pytest.mark.parametrize("text", ["[bold]x[/bold]", "[/]", "[/red]", "runs[1]/out", "[link=http://evil]x[/link]"])
def test_rich_prints_brackets_as_text(rich_output: tuple[RichReporter, io.StringIO], text: str) -> None:
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
    monkeypatch.setattr(sys, "stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert isinstance(make_reporter(), RichReporter)


def test_a_log_file_gets_a_line_for_every_tenth_and_after_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def lines(seconds_each: float, total: int) -> list[str]:
        with PlainReporter().progress("training") as progress:
            for done in range(1, total + 1):
                clock[0] += seconds_each
                progress.update(done, total, loss=1.25)
        return capsys.readouterr().out.splitlines()

    assert len(lines(0.001, 1000)) == 2
    found = lines(1.0, 200)
    assert [line.split(",")[1].strip() for line in found] == ["0%", *[f"{each}0%" for each in range(1, 11)]]
    assert found[1] == "    training 20/200, 10%, 3 min left, loss 1.2500"
    hours = lines(36.0, 1000)
    assert 30 < len(hours) < 100
    assert any(line.endswith("9.9 h left, loss 1.2500") for line in hours)


def seen_in_terminal(tmp_path: Any, columns: int, **environment: str) -> str:
    """What a program with a progress bar writes into a real terminal of some width."""
    pty = pytest.importorskip("pty")
    import fcntl
    import os
    import struct
    import subprocess
    import sys
    import termios

    program = (
        "import time; from kolotune.foundation.reporter import make_reporter; say = make_reporter()\n"
        "say.doing('train: training the adapter'); say.note('/a/long/path/' + 'x' * 90)\n"
        "with say.progress('training') as count:\n"
        "    for done in range(1, 31):\n"
        "        time.sleep(0.02); count.update(done, 30, loss=2.5 - done / 100, tokens_per_second=1234)\n"
        "        done == 15 and say.note('held-out loss after step 15: 2.1')\n"
        "say.success('train: adapter')\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=theirs, stderr=theirs, stdin=theirs,
        env={**known, "TERM": "xterm-256color", **environment},
    )  # fmt: skip
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 65536):
            written += piece
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0
    return written.decode()


def left_on_screen(written: str, columns: int) -> list[str]:
    """The lines that a terminal shows in the end: it knows what rich uses, and fails on anything else."""
    import re

    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[?0-9;]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", written):
        if code == "\r":
            column = 0
        elif code == "\n":
            row += 1
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code.endswith("K"):
            lines[row] = "" if code == "\x1b[2K" else lines[row][:column]
        else:
            assert not code or code[-1] in "mhl", code
        lines += [""] * (row + 1 - len(lines))
        for char in text:
            if column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("columns", [80, 40])
def test_a_terminal_shows_one_bar_and_no_leftovers(tmp_path: Any, columns: int) -> None:
    written = seen_in_terminal(tmp_path, columns)
    assert "\x1b[33m" in written and "\x1b[?25h" in written.rpartition("\x1b[?25l")[2]  # the cursor is back
    lines = left_on_screen(written, columns)
    bars = [line for line in lines if line.startswith("training ")]
    assert len(bars) == 1 and "30/30" in bars[0] and len(bars[0]) <= columns
    assert "loss 2.2000" in bars[0] and ("1234 tokens/s" in bars[0] or columns == 40)
    assert any(f"{done}/30 00:0" in written.replace("\x1b[0m", "").replace("\x1b[36m", "") for done in range(2, 20))
    path = "".join(lines[1:4]) if columns == 40 else "".join(lines[1:3])
    assert "/a/long/path/" + "x" * 90 in path
    assert [line for line in lines if line][-1] == "train: adapter"
    assert sum("held-out loss" in line for line in lines) == 1


def test_no_color_is_respected(tmp_path: Any) -> None:
    written = seen_in_terminal(tmp_path, 80, NO_COLOR="1")
    import re

    codes = {code for found in re.findall(r"\x1b\[([0-9;]*)m", written) for code in found.split(";")}
    assert not {code for code in codes if code and int(code) >= 30}


@pytest.mark.parametrize("kind", [PlainReporter, JsonReporter])
def test_a_line_is_written_in_one_piece(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads report at the same time, and their lines must not mix."""
    pieces: list[str] = []

    class Pieces(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Pieces())
    reporter = kind()
    reporter.doing("this")
    reporter.note("that")
    written = [piece for piece in pieces if piece]
    assert len(written) == 2 and all(piece.endswith("\n") for piece in written)
