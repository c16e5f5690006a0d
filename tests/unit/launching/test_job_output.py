"""The output of a job, in chunks of any size."""

from __future__ import annotations

import itertools
import json
from pathlib import Path, PurePosixPath

from hypothesis import given
from hypothesis import strategies as st
from support.jobs import Notebook

from kolotune.launching.job_output import JobOutput
from kolotune.runners.container.path_map import PathMap

EVENTS = [
    {"event": "doing", "text": "reading /far/chäts.jsonl"},
    {"event": "progress", "title": "training", "done": 1, "total": 2},
    {"event": "failure", "cause": "/far/chäts.jsonl: bad", "hint": "", "exit_code": 3},
    {"event": "ended", "code": 3},
]
OUTPUT = "".join(f"{json.dumps(event, ensure_ascii=False)}\n" for event in EVENTS[:2]).encode()
OUTPUT += b"a library's \xff warning in /far\n" + "".join(f"{json.dumps(event)}\n" for event in EVENTS[2:]).encode()


@given(st.lists(st.integers(0, len(OUTPUT) - 1), max_size=5))
def test_the_size_of_chunks_makes_no_difference(cuts: list[int]) -> None:
    notebook, paths = Notebook(), PathMap()
    paths.add(PurePosixPath("/far"), Path("/here"))
    output = JobOutput(notebook, paths)
    edges = [0, *sorted(cuts), len(OUTPUT)]
    for begin, end in itertools.pairwise(edges):
        assert output.code is None
        output.feed(OUTPUT[begin:end])
    output.close()
    assert notebook.lines[0] == "... reading /here/chäts.jsonl"
    assert notebook.lines[1].strip().startswith("training 1/2")
    assert notebook.lines[2:] == ["3 /here/chäts.jsonl: bad"]
    assert (output.code, output.cause) == (3, "/here/chäts.jsonl: bad")
    assert output.last_lines() == "a library's � warning in /here"


def test_without_a_reporter_the_end_is_known() -> None:
    output = JobOutput(None, PathMap())
    output.feed(OUTPUT)
    assert (output.code, "bad" in output.cause) == (3, True)
