"""Requests with the Modelfile's defaults, and requests that are refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from kolotune.foundation.config import DEFAULT_TEMPERATURE
from kolotune.ollama.modelfile import ModelDescription
from kolotune.serving.requests import CHAT, COMPLETION, BadRequest, Defaults

HELLO = {"role": "user", "content": "Hello"}
PLAIN = Defaults(ModelDescription("./a.gguf"))
OWN = Defaults(
    ModelDescription(
        "./a.gguf",
        system="Be brief.",
        parameters=(
            ("stop", "<|im_end|>"),
            ("stop", "###"),
            ("temperature", 0.2),
            ("top_k", 5),
            ("seed", 3),
            ("num_predict", 7),
            ("num_ctx", 100),
            ("use_mmap", True),
        ),
        messages=(("user", "Hi"), ("assistant", "Hi.")),
    ),
    ("<|im_end|>", "</s>"),
)


def applied(defaults: Defaults, path: str = CHAT, **more: Any) -> dict[str, Any]:
    asked = {"messages": [HELLO]} if path == CHAT else {}
    return defaults.apply(path, {**asked, **more})[0]


def test_what_the_modelfile_says_applies_where_a_request_says_nothing() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
    ]
    whole = applied(OWN)
    assert whole["messages"] == [*turns, HELLO]
    assert whole["stop"] == ["<|im_end|>", "###", "</s>"]
    chosen = ("temperature", "top_k", "seed", "max_tokens")
    assert [whole[name] for name in chosen] == [0.2, 5, 3, 7] and "top_p" not in whole
    for own in ("system", "developer"):
        loud = {"role": own, "content": ""}
        assert applied(OWN, messages=[loud, HELLO])["messages"] == [*turns[1:], loud, HELLO]
    whole = applied(OWN, temperature=0, top_k=None, seed=0, max_completion_tokens=9, stop="b")
    assert whole["temperature"] == 0 and whole["top_k"] == 5 and whole["seed"] == 0
    assert "max_tokens" not in whole and whole["stop"] == ["<|im_end|>", "###", "</s>", "b"]
    assert OWN.unused == ["use_mmap"]


def test_what_applies_without_a_modelfile() -> None:
    assert applied(PLAIN) == {
        "messages": [HELLO],
        "temperature": DEFAULT_TEMPERATURE,
        "stop": [],
        "chat_template_kwargs": {},
    }
    assert applied(PLAIN, COMPLETION, prompt="a", stop=["b", ""]) == {
        "prompt": "a",
        "temperature": DEFAULT_TEMPERATURE,
        "stop": ["b"],
    }
    assert applied(OWN, "/v1/embeddings", input="a") == {"input": "a"}


@pytest.mark.parametrize(
    ("given", "thinks"), [({}, False), ({"enable_thinking": True}, True), ({"thinking": True}, True)]
)
def test_the_switches_of_a_template_are_set_together(given: dict[str, bool], thinks: bool) -> None:
    switched = Defaults(ModelDescription("./a.gguf"), switches=("enable_thinking", "thinking"))
    assert applied(switched, chat_template_kwargs=given)["chat_template_kwargs"] == {
        "enable_thinking": thinks,
        "thinking": thinks,
    }


def test_fields_without_effect_are_named() -> None:
    common = {"user": "me", "store": False, "n": 1, "service_tier": "auto", "temprature": None, "tools": []}
    assert PLAIN.apply(CHAT, {"messages": [HELLO], **common})[1] == []
    odd = {"temprature": 1, "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
    whole, unused = PLAIN.apply(CHAT, {"messages": [HELLO], **odd})
    assert unused == ["temprature", "reasoning_effort", "chat_template_kwargs.enable_thinking"]
    assert whole["temprature"] == 1, "what is passed on is the server's matter"
    assert PLAIN.apply(COMPLETION, {"prompt": "a", "messages": []})[1] == ["messages"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": "Hello"}, "messages: "),
        ({"messages": ["Hello"]}, "messages.0.role: "),
        ({"messages": [HELLO, {"role": "usr", "content": "a"}]}, "messages.1.role: must be one of system"),
        ({"functions": [{"name": "f"}]}, r"functions: not supported \(use tools\)"),
        ({"audio": {"voice": "a"}, "web_search_options": {"a": 1}}, "audio, web_search_options: not supported"),
        ({"chat_template_kwargs": "a"}, "chat_template_kwargs: "),
    ],
)
def test_refused_requests(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequest, match=f"^{reason}"):
        applied(PLAIN, **more)
