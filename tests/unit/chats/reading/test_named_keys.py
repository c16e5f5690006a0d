"""Keys that the user names: whether a record has them, at its top or in its turns."""

from __future__ import annotations

import json

import pytest

from kolotune.chats.reading.named_keys import named_keys
from kolotune.chats.reading.reading_options import ReadingOptions
from kolotune.chats.reading.record_keys import RecordPart

OPTIONS = ReadingOptions((("frage", RecordPart.QUESTION),), ("weight",))
TURNS = [{"role": "user", "content": "weight Frage", "Weight": 1}]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"Frage": "q", "answer": "weight"}, {"frage"}),
        ({"messages": TURNS}, {"weight"}),
        (TURNS, {"weight"}),
        ({"chat": {"messages": TURNS}}, {"weight"}),
        ({"messages": json.dumps(TURNS[:1]).replace(" Frage", "")}, {"weight"}),
        ({"question": "q"}, set()),
        ("text", set()),
    ],
)
def test_which_keys_a_record_has(record: object, named: set[str]) -> None:
    assert named_keys(record, OPTIONS) == named
    assert named_keys(record, ReadingOptions()) == frozenset()
