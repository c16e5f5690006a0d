"""Values that no tokenizer can take."""

from __future__ import annotations

import pytest

from kolotune.chats.reading.value_checks import MAX_DEPTH, value_fault


def nested(depth: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"a": ["x\0"]}, "nul"),
        ({"a\0": 1}, "nul"),
        (["\ud83d"], "lone-surrogate"),
        ({"\udc00": 1}, "lone-surrogate"),
        (float("nan"), "not-finite"),
        ([float("inf")], "not-finite"),
        ({"a": b"x"}, "bad-value"),
        (nested(MAX_DEPTH + 1), "too-deep"),
        (nested(100_000), "too-deep"),
    ],
)
def test_value_faults(value: object, kind: str) -> None:
    fault = value_fault(value)
    assert fault is not None
    assert fault.kind == kind


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "é😀", [], {}, {"a": [{"b": None}]}, nested(MAX_DEPTH)])
def test_good_values(value: object) -> None:
    assert value_fault(value) is None
