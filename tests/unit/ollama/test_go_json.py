"""JSON as Go writes it; the expected texts are those of Go 1.19."""

from __future__ import annotations

import math

import pytest

from kolotune.ollama.go_json import go_json


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ({"b": [1, "x"], "a": {}}, '{"b":[1,"x"],"a":{}}'),
        ('é\n\t\x01<b>&\u2028"\\/', '"é\\n\\t\\u0001\\u003cb\\u003e\\u0026\\u2028\\"\\\\/"'),
        (2, "2"),
        (2.0, "2"),
        (-0.5, "-0.5"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (1.5e300, "1.5e+300"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (123456789012345678, "123456789012345680"),
        (2**70, "1.1805916207174113e+21"),
    ],
)
def test_texts(value: object, text: str) -> None:
    assert go_json(value) == text


@pytest.mark.parametrize("value", [math.inf, math.nan, {1}])
def test_what_has_no_json(value: object) -> None:
    with pytest.raises(TypeError):
        go_json(value)
