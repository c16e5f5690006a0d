"""Requests that are accepted, and requests that are refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kolotune.serving.requests import BadRequest, read_request

HELLO = [{"role": "user", "content": "Hello"}]


def body(**more: Any) -> bytes:
    return json.dumps({"model": "any", "messages": HELLO, **more}).encode()


def test_accepted_requests() -> None:
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "terse."}]
    turns = [{"role": "developer", "content": parts}, {"role": "user", "content": "Hi", "name": "me"}]
    request = read_request(
        body(messages=turns, stop="a", max_tokens=3, max_completion_tokens=5, user="me", n=1, tools=[])
    )
    assert [message.as_turn() for message in request.messages] == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hi"},
    ]
    assert request.stops == ("a",) and request.longest == 5
    assert read_request(body(stop=["a", "", "b"])).stops == ("a", "b")
    assert read_request(body(stop=None)).stops == () and read_request(body()).longest is None
    assert read_request(body(response_format={"type": "text"})).messages[0].content == "Hello"


@pytest.mark.parametrize(
    ("more", "field"),
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
def test_refused_requests(more: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest, match=f"^{field}"):
        read_request(body(**more))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"{}", b"\xff"])
def test_other_bodies_are_refused(data: bytes) -> None:
    with pytest.raises(BadRequest):
        read_request(data)
