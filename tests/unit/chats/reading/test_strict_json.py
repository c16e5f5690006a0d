"""The fast JSON decoder returns what the strict one returns, or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kolotune.chats.reading.faults import RecordError
from kolotune.chats.reading.strict_json import STRICT, parse, parse_fast

_KEY = st.sampled_from(['"a"', '"b"', '"\\u0061"', '":"', '"\\":"', '" "', '""'])
_COLON = st.sampled_from([":", ": ", " :", "\t:", "\n: "])
_SCALAR = st.sampled_from(
    ['"x"', '":y"', '"\\":"', '" :"', "1", "-0.5e3", "null", "true", '"\\ud83d\\ude00"', "NaN", "1e999"]
)


def _object(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.tuples(_KEY, _COLON, values).map("".join)
    return st.lists(members, max_size=3).map(lambda parts: "{" + ", ".join(parts) + "}")


_VALUE = st.recursive(
    _SCALAR, lambda inner: _object(inner) | st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
)


@given(text=_object(_VALUE))
def test_the_fast_decoder_returns_the_same_or_nothing(text: str) -> None:
    fast = parse_fast(text)
    try:
        strict = STRICT.decode(text)
    except RecordError:
        assert fast is None
    else:
        assert fast in (None, strict)


def test_the_fast_decoder_reads_ordinary_records() -> None:
    assert parse_fast('{"messages": [{"role": "user", "content": "a: \\"b\\" {c}"}]}') is not None


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', '{"a" :1,"a" :":x"}', '{"x":{"a":1,"\\u0061":2}}', '{"a":1,"b":NaN}']
)
def test_faults_are_reported(text: str) -> None:
    with pytest.raises(RecordError):
        parse(text.encode())
