"""The quick way of reading JSON must find what the strict one finds, or leave it to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kolotune.chats.reading.faults import RecordError
from kolotune.chats.reading.strict_json import _DECODER, _quickly, parse

_KEY = st.sampled_from(['"a"', '"b"', '"\\u0061"', '":"', '"\\":"', '" "', '""'])
_COLON = st.sampled_from([":", ": ", " :", "\t:", "\n: "])
_SCALAR = st.sampled_from(
    ['"x"', '":y"', '"\\":"', '" :"', "1", "-0.5e3", "null", "true", '"\\ud83d\\ude00"', "NaN", "1e999"]
)


def _object(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.tuples(_KEY, _COLON, values).map("".join)
    return st.lists(members, max_size=3).map(lambda found: "{" + ", ".join(found) + "}")


_VALUE = st.recursive(
    _SCALAR, lambda inner: _object(inner) | st.lists(inner, max_size=3).map(lambda found: f"[{','.join(found)}]")
)


@given(text=_object(_VALUE))
def test_the_quick_way_finds_the_same_or_nothing(text: str) -> None:
    found = _quickly(text)
    try:
        strict = _DECODER.decode(text)
    except RecordError:
        assert found is None
    else:
        assert found in (None, strict)


def test_the_quick_way_is_taken() -> None:
    assert _quickly('{"messages": [{"role": "user", "content": "a: \\"b\\" {c}"}]}') is not None


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', '{"a" :1,"a" :":x"}', '{"x":{"a":1,"\\u0061":2}}', '{"a":1,"b":NaN}']
)
def test_what_is_wrong_is_told(text: str) -> None:
    with pytest.raises(RecordError):
        parse(text.encode())
