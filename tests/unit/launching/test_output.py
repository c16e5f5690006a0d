"""A job's output, in any pieces, told here."""

from __future__ import annotations

import itertools
import json
from pathlib import Path, PurePosixPath

from hypothesis import given
from hypothesis import strategies as st

from kolotune.foundation.reporter import PlainReporter
from kolotune.launching.output import Listener
from kolotune.runners.container.paths import Paths


class Notebook(PlainReporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def _line(self, text: str) -> None:
        self.lines.append(text)

    def failure(self, cause: str, hint: str, exit_code: int = 1) -> None:
        self.lines.append(f"{exit_code} {cause}")


EVENTS = [
    {"event": "doing", "text": "reading /far/chäts.jsonl"},
    {"event": "progress", "title": "training", "done": 1, "total": 2},
    {"event": "failure", "cause": "/far/chäts.jsonl: bad", "hint": "", "exit_code": 3},
    {"event": "ended", "code": 3},
]
OUTPUT = "".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in EVENTS[:2]).encode()
OUTPUT += b"a library's \xff warning in /far\n" + "".join(f"{json.dumps(each)}\n" for each in EVENTS[2:]).encode()


@given(st.lists(st.integers(0, len(OUTPUT) - 1), max_size=5))
def test_pieces_make_no_difference(cuts: list[int]) -> None:
    said, paths = Notebook(), Paths()
    paths.add(PurePosixPath("/far"), Path("/here"))
    listener = Listener(said, paths)
    edges = [0, *sorted(cuts), len(OUTPUT)]
    for begin, end in itertools.pairwise(edges):
        assert listener.code is None
        listener.feed(OUTPUT[begin:end])
    listener.close()
    assert said.lines[0] == "... reading /here/chäts.jsonl"
    assert said.lines[1].strip().startswith("training 1/2")
    assert said.lines[2:] == ["3 /here/chäts.jsonl: bad"]
    assert (listener.code, listener.cause) == (3, "/here/chäts.jsonl: bad")
    assert listener.last_words() == "a library's � warning in /here"


def test_one_that_tells_nobody_knows_how_it_ended() -> None:
    listener = Listener(None, Paths())
    listener.feed(OUTPUT)
    assert (listener.code, "bad" in listener.cause) == (3, True)
