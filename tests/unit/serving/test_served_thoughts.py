"""Thoughts over OpenAI's API: a model that answers every prompt with a thought and a text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.served_text import Clients, serving_text

from kolotune.foundation.reporter import PlainReporter

HELLO = {"role": "user", "content": "Is it warm?"}
THOUGHT, TEXT = "Hm 20", "Yes!"
BEGIN, END = "<think>", "[/end]"  # of which no token occurs twice
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}[/end]{% endif %}
{{- message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> Iterator[Clients]:
    folder = tmp_path_factory.mktemp("thinker") / "model"
    with serving_text(folder, f"{BEGIN}{THOUGHT}{END}{TEXT}", TEMPLATE, reporter) as started:
        yield started


@pytest.fixture
def client(clients: Clients) -> Any:
    return clients.ours


def ask(client: Any, *turns: dict[str, str], **more: Any) -> Any:
    asked = {"messages": [*turns, HELLO], "temperature": 0, "max_tokens": 40, **more}
    return client.chat.completions.create(model="run", **asked)


def test_a_thought_is_apart_from_the_text(clients: Clients) -> None:
    for client in clients:
        message = ask(client, stop=["<|im_end|>"]).choices[0].message
        assert (message.reasoning_content, message.content) == (THOUGHT, TEXT)


def test_a_thought_is_apart_in_a_stream(client: Any) -> None:
    thought = text = ""
    for chunk in ask(client, stream=True):
        for choice in chunk.choices:
            assert not (text and getattr(choice.delta, "reasoning_content", None))
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            text += choice.delta.content or ""
    assert (thought, text) == (THOUGHT, TEXT)


def test_a_thought_is_text_where_that_is_asked_for(client: Any) -> None:
    message = ask(client, extra_body={"reasoning_format": "none"}).choices[0].message
    assert message.content == f"{BEGIN}{THOUGHT}{END}{TEXT}"
    assert not getattr(message, "reasoning_content", None)


def test_the_template_gets_earlier_thoughts(client: Any) -> None:
    said = {"role": "assistant", "content": TEXT}
    without, with_one = (
        ask(client, HELLO, turn).usage.prompt_tokens for turn in (said, {**said, "reasoning_content": THOUGHT})
    )
    assert with_one > without
