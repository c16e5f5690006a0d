"""Messages of trials that run at the same time."""

from __future__ import annotations

import json
import threading

import pytest

from kolotune.foundation.reporter import JsonReporter, PlainReporter, Reporter
from kolotune.sweeping.attribution import TrialReporter


def report(reporter: Reporter) -> TrialReporter:
    trial = TrialReporter(reporter, "trial 2", threading.Lock())
    trial.doing("begins")
    trial.table("Settings", ("of",), (("x",),))
    with trial.progress("training") as progress:
        progress.update(0, 2, loss=3.0)
        progress.update(2, 2, loss=2.0)
    trial.success("done")
    trial.failure("it broke", "fix it", 9)
    return trial


def test_each_line_names_its_trial(capsys: pytest.CaptureFixture[str]) -> None:
    trial = report(PlainReporter())
    output = capsys.readouterr()
    assert [line[4:] for line in output.out.splitlines()] == [
        "trial 2: begins", "trial 2: training 0/2, 0%, loss 3.0000", "trial 2: training 2/2, 100%, loss 2.0000",
        "trial 2: done",
    ]  # fmt: skip
    assert trial.cause == "it broke" and not output.err, "whoever ends the trial reports the failure"


def test_programs_get_progress_events(capsys: pytest.CaptureFixture[str]) -> None:
    report(JsonReporter())
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["doing", "progress", "progress", "success"]
    assert {event.get("title") for event in events} == {None, "trial 2: training"} and events[2]["done"] == 2
