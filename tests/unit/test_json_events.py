"""Every line of --json is what docs/json-events.md says."""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kolotune.foundation import reporter
from kolotune.foundation.reporter import EVENTS, WITH_MORE_FIELDS, JsonReporter
from kolotune.run_folder.layout import RunFolder

Call = Callable[..., tuple[int, str]]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "json-events.md"
COMMON = {"event", "time"}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a field."""
    if hint in (str, int):
        return type(value) is hint
    assert hint == list[dict[str, str]], f"no such field so far: {hint}"
    texts = [text for row in value for pair in row.items() for text in pair]
    return isinstance(value, list) and all(isinstance(text, str) for text in texts)


def checked(line: str) -> dict[str, Any]:
    """The event in a line, if it has the documented fields and types, and no others where none are promised."""
    event: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    shape = EVENTS[event["event"]]
    known = typing.get_type_hints(shape)
    more = set(event) - set(known)
    assert not more or event["event"] in WITH_MORE_FIELDS, more
    for name, hint in known.items():
        assert fits(event[name], hint), (name, event[name])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", event["time"])
    return event


def events(output: str) -> list[dict[str, Any]]:
    return [checked(line) for line in output.splitlines()]


def test_the_document_names_every_event_and_field() -> None:
    documented: dict[str, set[str]] = {}
    for part in re.split(r"^## ", DOCS.read_text(encoding="utf-8"), flags=re.M)[1:]:
        kind = part.splitlines()[0].strip("` ")
        documented[kind] = set(re.findall(r"^\| `(\w+)` \|", part, flags=re.M)) | COMMON
    assert documented == {kind: set(typing.get_type_hints(shape)) for kind, shape in EVENTS.items()}


def test_a_wrong_event_would_be_seen() -> None:
    good = {"event": "note", "time": "2026-01-01T00:00:00+00:00", "text": "x"}
    assert checked(json.dumps(good)) == good
    for bad in ({**good, "text": 1}, {**good, "more": 1}, {"event": "note", "text": "x"}, {**good, "time": "now"}):
        with pytest.raises((KeyError, AssertionError)):
            checked(json.dumps(bad))


def test_training_reports_its_progress_in_numbers(run_copy: RunFolder, capfd: Any, kolotune: Call) -> None:
    code, output = kolotune("train", run_copy.root, "--epochs", "2", "--json")
    assert code == 0
    found = events(output)
    counts = [each for each in found if each["event"] == "progress"]
    assert [(each["done"], each["total"]) for each in counts] == [(1, 2), (2, 2)]
    assert all(isinstance(each["loss"], float) and isinstance(each["tokens_per_second"], int) for each in counts)
    assert found[-1]["event"] == "success"


def test_other_verbs_and_failures(run_copy: RunFolder, tmp_path: Path, kolotune: Call) -> None:
    (tmp_path / "broken.jsonl").write_text("{\n")
    base = ["--base-model", run_copy.root.parent / "none"]
    calls: list[tuple[list[Any], int]] = [
        (["status", run_copy.root], 0),
        (["runs", tmp_path], 0),
        (["clean", run_copy.root, "--dry-run"], 0),
        (["models"], 0),
        (["check", tmp_path / "broken.jsonl"], 3),
        (["run", tmp_path / "missing.jsonl", *base], 3),
        (["run", tmp_path / "broken.jsonl", "--epochs", "x"], 2),
        (["run", "--nonsense"], 2),
        (["nonsense"], 2),
        (["status", tmp_path / "none"], 12),
    ]
    for arguments, expected in calls:
        code, output = kolotune(*arguments, "--json")
        found = events(output)
        assert code == expected, output
        assert (found[-1]["event"] == "failure") == (code != 0)
        assert code == 0 or (found[-1]["exit_code"] == code and found[-1]["hint"])


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonReporter().progress("count") as progress:
        progress.update(1, 2, loss=float("nan"), best=float("inf"))
    event = checked(capsys.readouterr().out)
    assert event["loss"] is None and event["best"] is None


def test_a_replay_passes_the_fields_on_except_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    say = JsonReporter()
    say.failure("it broke", "fix it", 9)
    say.result("42", answer=42)
    with say.progress("count") as progress:
        progress.update(1, 1, loss=0.5)
    before = capsys.readouterr().out
    replay = reporter.Replay(JsonReporter())
    for line in before.splitlines():
        replay.show(json.loads(line))
    first, second = (
        [{**checked(line), "time": ""} for line in text.splitlines()] for text in (before, capsys.readouterr().out)
    )
    assert first == second
