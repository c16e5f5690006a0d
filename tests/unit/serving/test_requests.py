"""What may be asked for, and what is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kolotune.serving.requests import BadRequest, read_request

HELLO = [{"role": "user", "content": "Hello"}]


def body(**more: Any) -> bytes:
    return json.dumps({"model": "any", "messages": HELLO, **more}).encode()


def test_what_is_read() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "terse."}]
    turns = [{"role": "developer", "content": parts}, {"role": "user", "content": "Hi", "name": "me"}]
    found = read_request(
        body(messages=turns, stop="a", max_tokens=3, max_completion_tokens=5, user="me", n=1, tools=[])
    )
    assert [each.as_turn() for each in found.messages] == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hi"},
    ]
    assert found.stops == ("a",) and found.longest == 5
    assert read_request(body(stop=["a", "", "b"])).stops == ("a", "b")
    assert read_request(body(stop=None)).stops == () and read_request(body()).longest is None
    assert read_request(body(response_format={"type": "text"})).messages[0].content == "Hello"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True, "logit_bias": {"1": 2}}, "logprobs, logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=f"^{said}"):
        read_request(body(**more))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"{}", b"\xff"])
def test_what_is_no_request(data: bytes) -> None:
    with pytest.raises(BadRequest):
        read_request(data)
