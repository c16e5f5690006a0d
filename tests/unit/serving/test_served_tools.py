"""Tools over OpenAI's API: a model that answers every prompt with one call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.example import EXAMPLES
from support.served_text import Clients, serving_text

from kolotune.foundation.reporter import PlainReporter

HELLO = {"role": "user", "content": "Is it warm?"}
UNIT = {"type": "object", "properties": {"unit": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "warm", "description": "Whether it is warm.", "parameters": UNIT}}
SAID = '<tool_call>{"name":"warm","arguments":{}}[/end]'
CALLED = ("warm", {})
# Of the example's template: none of a call's tokens may occur twice.
OWN_FORM = {
    "<tool_call>\\n": "<tool_call>",
    "\\n</tool_call>": "[/end]",
    '"name": ': '"name":',
    ', "arguments": ': ',"arguments":',
}


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory, reporter: PlainReporter) -> Iterator[Clients]:
    template = (EXAMPLES / "tools" / "chat_template.jinja").read_text(encoding="utf-8")
    for theirs, own in OWN_FORM.items():
        assert theirs in template
        template = template.replace(theirs, own)
    folder = tmp_path_factory.mktemp("speaker") / "model"
    with serving_text(folder, SAID, template, reporter) as started:
        yield started


@pytest.fixture(params=Clients._fields)
def create(request: pytest.FixtureRequest, clients: Clients) -> Any:
    """The function of a client that creates a completion. llama.cpp's server alone answers the same."""
    client = getattr(clients, request.param)
    return lambda **asked: client.chat.completions.create(
        **{"model": "run", "messages": [HELLO], "temperature": 0, "max_tokens": 60, "stop": ["<|im_end|>"], **asked}
    )


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "warm"}}])
def test_calls_are_parsed(create: Any, choice: Any) -> None:
    answer = create(tools=[TOOL], tool_choice=choice).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == CALLED and call.id
    assert answer.finish_reason == "tool_calls" and not answer.message.content


def test_calls_are_streamed(create: Any) -> None:
    name, arguments, reason = "", "", None
    for chunk in create(tools=[TOOL], stream=True):
        for choice in chunk.choices:
            assert not choice.delta.content
            for call in choice.delta.tool_calls or []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
            reason = choice.finish_reason or reason
    assert (name, json.loads(arguments)) == CALLED and reason == "tool_calls"


def test_a_call_is_text_where_no_tools_are_given(create: Any) -> None:
    assert create().choices[0].message.content == SAID
    assert create(tools=[TOOL], tool_choice="none").choices[0].message.content == SAID


def test_results_go_into_the_prompt(create: Any) -> None:
    call = create(tools=[TOOL]).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "no"}
    asked = [HELLO, call.model_dump(exclude_none=True), result]
    longer = create(messages=asked, tools=[TOOL]).usage.prompt_tokens
    assert longer > create(tools=[TOOL]).usage.prompt_tokens + 30
