"""What several at work tell at the same time."""

from __future__ import annotations

import json
import threading

import pytest

from kolotune.foundation.reporter import JsonReporter, PlainReporter, Reporter
from kolotune.sweeping.attribution import OneOfSeveral


def tell(reporter: Reporter) -> OneOfSeveral:
    one = OneOfSeveral(reporter, "trial 2", threading.Lock())
    one.doing("begins")
    one.table("Settings", ("of",), (("x",),))
    with one.progress("training") as progress:
        progress.update(0, 2, loss=3.0)
        progress.update(2, 2, loss=2.0)
    one.success("done")
    one.failure("it broke", "mend it", 9)
    return one


def test_each_line_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    one = tell(PlainReporter())
    told = capsys.readouterr()
    assert [line[4:] for line in told.out.splitlines()] == [
        "trial 2: begins", "trial 2: training 0/2, 0%, loss 3.0000", "trial 2: training 2/2, 100%, loss 2.0000",
        "trial 2: done",
    ]  # fmt: skip
    assert one.cause == "it broke" and not told.err, "how it ended is for others to tell"


def test_programs_get_a_running_count(capsys: pytest.CaptureFixture[str]) -> None:
    tell(JsonReporter())
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["event"] for each in events] == ["doing", "progress", "progress", "success"]
    assert {each.get("title") for each in events} == {None, "trial 2: training"} and events[2]["done"] == 2
